"""Does an exported checkpoint answer as the adapter did, and what does the export take?

    python bench/export.py tiny/model tiny/corpus                   # every strategy and speech adapter; six minutes
    python bench/export.py DIR/model DIR/corpus --full              # at full size, in bfloat16; DIR of full_size.py

The small model is trained for a few steps in every way; the full-size one gets an adapter of random weights. Then
adapter and checkpoint answer the same utterances. The logits of the first token of their answers are compared with
those of the adapter in float32 arithmetic: two computations in bfloat16 differ by the rounding of both. At full size
that takes 20 minutes on two cores, 20 GB of memory, and 20 GB of disk beside DIR.
"""

from dataclasses import dataclass
import gc
import json
from pathlib import Path
import re
import shutil

import workload  # first: it finds the project

# isort: split
import full_size
from peft import LoraConfig
import readme
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import torch
import tyro

import data
import evaluate
import model as models
from support import cli

WAYS = [(s, w) for s in models.STRATEGIES for w in ("merge", "continue", "none") if (s, w) != ("full", "continue")]
TINY = "--rank 16 --alpha 32 --learning-rate 3e-3 --batch-size 8 --accumulation 1 --epochs 1 --limit 80".split()
# At full size: B of LoRA, ten times what the rates of three epochs add up to (docs/running.md), so that the adapter
# changes more than bfloat16 blurs
LEARNT = 2.4e-2
ADDING = re.compile(r"(o_proj|down_proj)\.(lora_B\.)?weight")  # the last weights of a block, which add to its input
CALM = 1 / 1600  # our choice: all blocks together then add half of what the embedding brings, where an answer begins
NF4 = ("nf4", "merge", "float32")
TOKENS = 80  # of an answer


@dataclass
class Settings:
    model: tyro.conf.Positional[str]  # checkpoint folder
    data: tyro.conf.Positional[str]  # corpus folder
    full: bool = False  # a full-size model: LoRA beside the merged speech adapter, in bfloat16, with one utterance
    utterances: cli.Count = 100  # to be answered
    output: Path = Path("export-bench")  # for runs and checkpoints; removed afterwards


def ask(model, utterances, tokens):
    """Texts, expected scores (N, 4, 11), and first_logits twice: in the type of the weights, and in float32."""
    lines = model.eval().answer(utterances, ("greedy", "expected"), tokens, True)
    scores = torch.tensor([[*line["scores"].values()] for line in lines if "scores" in line])
    heard = model.hear(utterances)
    logits = first_logits(model, utterances, heard)
    del model.core.model.embed_tokens_extend.image_embed  # room for twice the bytes
    return [line["output"] for line in lines], scores, logits, first_logits(model.float(), utterances, heard)


@torch.no_grad()
def first_logits(model, utterances, heard):
    """The logits of the first token of each answer, (2N, V) in float32. heard: of model.hear."""
    asked = [(model.question(u, task), audio) for u, audio in zip(utterances, heard) for task in u.tasks]
    hidden = torch.cat([model._read_prompts([question], [audio])[0] for question, audio in asked])
    return model._logits(hidden).float()


def train(strategy, way, dtype, settings):
    """A run folder of train.py."""
    run = settings.output / "run"
    quick = [*TINY]
    if strategy == "full" or way == "continue":
        quick = [word for word in quick if word not in ("--rank", "16", "--alpha", "32")]
    quantize = ["--quantize", "nf4"] if strategy == "nf4" else []
    quick += ["--strategy", "lora" if quantize else strategy, "--speech-adapter", way, *quantize, "--dtype", dtype]
    where = ["--model", settings.model, "--data", settings.data, "--audio-cache", settings.output / "audio"]
    full_size.run("train.py", [*where, *quick, "--output", run])
    return run


def write_adapter(settings, calm):
    """The folder of an epoch with random LoRA of rank 64 for a full-size checkpoint, or for its calm_copy."""
    folder, model = settings.output / "run", Path(settings.model)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    weights, where = {}, {}
    for name, file in index.items():
        with safe_open(model / file, "pt") as opened:
            if re.fullmatch(rf"({models.LORA_TARGETS})\.weight", name):
                outputs, inputs = opened.get_slice(name).get_shape()
                key, size = f"base_model.model.{name.removesuffix('weight')}lora_", inputs**-0.5
                weights[f"{key}A.weight"] = torch.empty(64, inputs).uniform_(-size, size)
                small = CALM if ADDING.search(name) and calm else 1
                weights[f"{key}B.weight"] = small * LEARNT * torch.randn(outputs, 64).sign()
            elif name == "model.embed_tokens.weight":
                last = max(full_size.SPECIAL_TOKENS.values())
                where["embed_tokens"] = [last + 1, last + 2]  # as the control tokens are added
                rows = torch.cat([opened.get_slice(name)[token : token + 1] for token in where["embed_tokens"]])
                weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows.float()
    folder.mkdir(parents=True)
    save_file(weights, folder / models.ADAPTER_FILE)
    LoraConfig(r=64, lora_alpha=128, target_modules="x", trainable_token_indices=where).save_pretrained(folder)
    trained = {"epoch": 1, "strategy": "lora", "speech_adapter": "merge", "dtype": "bfloat16"}
    trained |= {"model": str(model), "data": settings.data}
    (folder / "settings.json").write_text(json.dumps(trained))
    return folder


def calm_copy(model, folder):
    """A checkpoint with random weights whose blocks add little to what they are given.

    Else each block outweighs its input, and what was rounded by 0.2 % is 2 % of the logits 32 blocks later.
    """
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in Path(model).rglob("*.safetensors"):
        weights = {name: CALM * w if ADDING.search(name) else w for name, w in load_file(path).items()}
        save_file(weights, folder / path.relative_to(model), {"format": "pt"})
    return str(folder)


def measure(strategy, way, dtype, settings, calm=False):
    """Figures of one way."""
    run = write_adapter(settings, calm) if settings.full else train(strategy, way, dtype, settings)
    new = settings.output / "exported"
    figures = full_size.run("analysis/export.py", [new, "--adapter", run])
    utterances = data.read_corpus(settings.data, "test", None, 1 if settings.full else settings.utterances)
    tokens = 8 if settings.full else TOKENS
    base = models.load_base(settings.model, None, dtype, "sdpa", "merge").eval()
    bare = first_logits(base, utterances, base.hear(utterances))
    del base
    asked = evaluate.ModelSettings(adapter=run, model=settings.model, dtype=dtype, attention="sdpa")
    texts, scores, logits, exact = ask(evaluate.load(evaluate.evaluations(asked)[0], asked), utterances, tokens)
    gc.collect()
    own = ask(models.load_base(str(new), None, dtype, "sdpa", "none"), utterances, tokens)
    for folder in (run, new):
        shutil.rmtree(folder)
    return figures | {
        "strategy": strategy,
        "speech_adapter": way,
        "dtype": dtype,
        "calm": calm,
        "answers": len(texts),
        "equal": sum(a == b for a, b in zip(texts, own[0])),
        "expected": (expectation(scores) - expectation(own[1])).abs().max().item(),
        "logits": relative(own[2], exact),
        "exact": relative(own[3], exact),
        "adapter": relative(logits, exact),
        "base": relative(bare, exact),
    }


def relative(logits, others):
    """Root mean square of a difference, by that of the logits."""
    return ((logits - others).norm() / others.norm()).item()


def expectation(distributions):
    return distributions @ torch.arange(11.0)


def main():
    settings = cli.parse(Settings, __doc__)
    settings.output = settings.output.resolve()  # the scripts run in the project's folder
    if settings.output.exists():
        raise cli.InputError(f"--output {settings.output} exists and would be removed: give the name of a new folder")
    rounded = ("lora", "merge", "bfloat16")
    ways = [rounded] if settings.full else [*((*pair, "float32") for pair in WAYS), rounded, NF4]
    torch.manual_seed(0)
    rows = [measure(*way, settings) for way in ways]
    if settings.full:
        settings.model = calm_copy(settings.model, settings.output / "model")
        rows.append(measure(*rounded, settings, calm=True))
    shutil.rmtree(settings.output)
    size = "full" if settings.full else "trained"
    workload.write_result(f"export-{size}", {"model": size, "ways": rows})
    print(readme.export({"model": size, "ways": rows}))


if __name__ == "__main__":
    cli.run_script("export.py", main)
