"""Does an exported checkpoint answer as the adapter did, and what does the export take?

    python bench/export.py tiny/model tiny/corpus                   # every strategy and speech adapter; four minutes
    python bench/export.py DIR/model DIR/corpus --full              # at full size, in bfloat16; DIR of full_size.py

Each way is trained for a few steps by train.py and exported. Then both answer the same utterances, and the logits of
the first token of their answers are compared.
"""

from dataclasses import dataclass
import gc
from pathlib import Path
import shutil

import workload  # first: it finds the project

# isort: split
import full_size
import readme
import torch
import tyro

import data
import evaluate
import model as models
from support import cli

WAYS = [(s, w) for s in models.STRATEGIES for w in ("merge", "continue", "none") if (s, w) != ("full", "continue")]
TINY = "--rank 16 --alpha 32 --learning-rate 3e-3 --batch-size 8 --accumulation 1 --epochs 1 --limit 80".split()
# One step of Adam moves every weight by the rate: as far as the paper's three epochs would
FULL = "--learning-rate 3e-3 --batch-size 2 --accumulation 1 --micro-batch 1 --epochs 1 --limit 1".split()
TOKENS = 80  # of an answer


@dataclass
class Settings:
    model: tyro.conf.Positional[str]  # checkpoint folder
    data: tyro.conf.Positional[str]  # corpus folder
    full: bool = False  # only LoRA beside the merged speech adapter, in bfloat16, with one utterance
    utterances: cli.Count = 100  # to be answered
    output: Path = Path("export-bench")  # for runs and checkpoints; removed afterwards


def answers(model, utterances, tokens):
    """Texts, expected scores (N, 4, 11), and the logits of each answer's first token (2N, V) in float32."""
    lines = model.eval().answer(utterances, ("greedy", "expected"), tokens, True)
    scores = [[*line["scores"].values()] for line in lines if "scores" in line]
    questions = [model.question(u, task) for u in utterances for task in u.tasks]
    heard = [audio for u, audio in zip(utterances, model.hear(utterances)) for _ in u.tasks]
    with torch.no_grad():
        hidden = torch.cat([model._read_prompts([q], [a])[0] for q, a in zip(questions, heard)])
        logits = model._logits(hidden).float()
    return [line["output"] for line in lines], torch.tensor(scores), logits


def measure(strategy, way, dtype, settings):
    """Figures of one way."""
    run, new = settings.output / "run", settings.output / "exported"
    where = ["--model", settings.model, "--data", settings.data, "--output", run, "--dtype", dtype]
    quick = [*FULL] if settings.full else [*TINY]
    if strategy == "full" or way == "continue":
        quick = [word for word in quick if word not in ("--rank", "16", "--alpha", "32")]
    quantize = ["--quantize", "nf4"] if strategy == "nf4" else []
    ways = ["--strategy", "lora" if quantize else strategy, "--speech-adapter", way, *quantize]
    full_size.run("train.py", [*where, *ways, *quick, "--audio-cache", settings.output / "audio"])
    figures = full_size.run("analysis/export.py", [new, "--adapter", run])
    utterances = data.read_corpus(settings.data, "test", None, 1 if settings.full else settings.utterances)
    asked = evaluate.ModelSettings(adapter=run, model=settings.model, revision=None, dtype=dtype, attention="sdpa")
    (evaluation,) = evaluate.evaluations(asked)
    tokens = 8 if settings.full else TOKENS
    texts, scores, logits = answers(evaluate.load(evaluation, asked), utterances, tokens)
    gc.collect()
    own = answers(models.load_base(str(new), None, dtype, "sdpa", "none"), utterances, tokens)
    shutil.rmtree(settings.output)
    return figures | {
        "strategy": strategy,
        "speech_adapter": way,
        "dtype": dtype,
        "answers": len(texts),
        "equal": sum(a == b for a, b in zip(texts, own[0])),
        "expected": (expectation(scores) - expectation(own[1])).abs().max().item(),
        "logits": (logits - own[2]).abs().max().item(),
        "spread": logits.std().item(),
    }


def expectation(distributions):
    return distributions @ torch.arange(11.0)


def main():
    settings = cli.parse(Settings, __doc__)
    ways = [("lora", "merge", "bfloat16")]
    if not settings.full:
        ways = [(*pair, "float32") for pair in WAYS] + [*ways, ("nf4", "merge", "float32")]
    settings.output = settings.output.resolve()  # the scripts run in the project's folder
    if settings.output.exists():
        raise cli.InputError(f"--output {settings.output} exists and would be removed: give the name of a new folder")
    rows = [measure(*way, settings) for way in ways]
    size = "full" if settings.full else "trained"
    workload.write_result(f"export-{size}", {"model": size, "ways": rows})
    print(readme.export({"model": size, "ways": rows}))


if __name__ == "__main__":
    cli.run_script("export.py", main)
