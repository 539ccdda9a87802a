"""The full-size model through the command lines of train.py and evaluate.py: does it fit, and how long does it take?

    python -m bench.full_size DIR                    # on a CPU: a step of two examples and an answer, in every case
    python -m bench.full_size DIR --only lora nf4    # some cases; the figures of the others are kept in DIR

Writes a checkpoint of the real shapes and format with random weights into DIR, once, and a corpus of the real lengths.
Then every case trains and evaluates in processes of their own, and the peak memory of each is measured. A CPU needs
18 GB of disk and 16 to 20 GB of memory. On a CUDA GPU the same command trains ten steps of the paper's batch, with all
defaults, and says how many hours its three epochs would take.
"""

from dataclasses import dataclass
import json
import os
from pathlib import Path
import re
import shutil
import signal
from statistics import mean
import subprocess
import sys
import time
from typing import Literal

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
import torch
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)
import tyro

from bench import workload
import data
import model as models
import prompts
from support import cli, files, pretrained

SHARDS = 2  # as transformers' converter writes them
STALE = 3  # of the same weights under main's names, which a branch keeps beside the converted ones; no index names them
RANK, ALPHA, DROPOUT = 320, 640, 0.01  # of the shipped speech adapter
TARGETS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}  # as its configuration lists them
VOCABULARY = 200_064
SPECIAL_TOKENS = {  # ids in that vocabulary; the control tokens come after the last one
    "<|endoftext|>": 199_999,
    "<|endoftext10|>": 200_010,  # image
    "<|endoftext11|>": 200_011,  # audio
    prompts.ASSISTANT: 200_019,
    prompts.END: 200_020,
    prompts.USER: 200_021,
    "<|tag|>": 200_028,
}

CASES = {
    "lora": ["--rank", "64"],
    "continue": ["--speech-adapter", "continue"],
    "nf4": ["--quantize", "nf4"],
    "resume": ["--rank", "64", "--epochs", "2"],  # killed after the first epoch
}
UTTERANCES = 320  # in each part of the corpus: 640 examples, ten of the paper's steps
TRAINING = {
    "cpu": "--dtype bfloat16 --limit 1 --batch-size 2 --accumulation 1 --micro-batch 1 --epochs 1".split(),
    "cuda": f"--limit {UTTERANCES} --epochs 1".split(),
}
EVALUATION = {"cpu": ["--limit", "1", "--max-new-tokens", "8"], "cuda": ["--limit", "16"]}
PAPERS_STEPS = 3 * 78
WARM = 3  # steps after which the others take equally long
# The scripts refuse a model of this size where there is no GPU, since nobody would wait for it. What it takes is the
# question here, so their limit is raised; all else is as typed.
LAUNCHER = (
    "import runpy, sys; from support import pretrained; pretrained.LARGEST_CPU_MODEL *= 10; del sys.argv[0]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)

# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint


def new_weights(shape):
    """Configuration of the network and of its speech adapter, and the weights of both, by name, on no device."""
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=models.LORA_TARGETS,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with torch.device("meta"):
        network = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**shape, dtype="bfloat16"))
        weights = network.state_dict()
        adapter = get_peft_model_state_dict(get_peft_model(network, lora), save_embedding_layers=False)
    del weights["lm_head.weight"]  # tied to the embedding
    lora.target_modules = TARGETS
    return network.config, weights, lora, adapter


def random_weight(name, weight):
    """Values of the usual size for a weight that has none."""
    if weight.ndim == 1:
        return torch.full(weight.shape, 0.0 if name.endswith(("bias", "mean")) else 1.0, dtype=torch.bfloat16)
    return torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, 0.02)


def write_shards(folder, weights):
    """Weights in SHARDS files of about equal size, of which one at a time is in memory, and their index."""
    total = sum(weight.numel() for weight in weights.values())
    shards, before = [{} for _ in range(SHARDS)], 0
    for name, weight in weights.items():
        shards[before * SHARDS // total][name] = weight
        before += weight.numel()
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        values = {name: random_weight(name, weight) for name, weight in shard.items()}
        save_file(values, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    for number in range(1, STALE + 1):
        (folder / f"model-{number:05}-of-{STALE:05}.safetensors").write_bytes(b"not to be read")
    (folder / "modeling_phi4mm.py").write_text("raise SystemExit('not to be run')\n")


def new_tokenizer(texts, vocabulary):
    """The benchmarks' tokenizer with the special tokens where the real one has them: near the end of the vocabulary."""
    words = workload.new_tokenizer(texts).backend_tokenizer
    bpe = json.loads(words.to_str())["model"]
    special = {token: number - VOCABULARY + vocabulary for token, number in SPECIAL_TOKENS.items()}
    tokenizer = Tokenizer(BPE(vocab=bpe["vocab"] | special, merges=[tuple(pair) for pair in bpe["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = words.pre_tokenizer, words.decoder
    tokenizer.add_special_tokens(list(special))
    end = next(iter(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def write_inputs(folder, shape, utterances):
    """Write folder/corpus and folder/model, where they are not there yet. Raises InputError when the disk is short."""
    config, weights, lora, adapter = new_weights(shape)
    trained = sum(weight.numel() for weight in adapter.values())
    needed = 16 * trained  # the largest run: the adapter, and a checkpoint of it with its two moments, in float32
    if not (folder / "model").exists():
        needed += 2 * (trained + sum(weight.numel() for weight in weights.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise cli.InputError(
            f"{folder} has {free / 1e9:.1f} GB of free disk and {needed / 1e9:.1f} GB are needed: choose another folder"
        )
    if not (folder / "corpus").exists():
        with files.whole(folder / "corpus") as temporary:
            workload.write_corpus(temporary, utterances)
    if not (folder / "model").exists():
        torch.manual_seed(0)
        texts = workload.texts_of(data.read_corpus(folder / "corpus", "train"))
        with files.whole(folder / "model") as temporary:
            for part in (config, new_tokenizer(texts, config.vocab_size), Phi4MultimodalFeatureExtractor()):
                part.save_pretrained(temporary)
            write_shards(temporary, weights)
            lora.save_pretrained(temporary / pretrained.SPEECH_ADAPTER)
            save_file(
                # the converter's names are without PEFT's prefix
                {name.removeprefix("base_model.model."): random_weight(name, w) for name, w in adapter.items()},
                temporary / pretrained.SPEECH_ADAPTER / "adapter_model.safetensors",
                {"format": "pt"},
            )


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def run(script, arguments, stop_at=None):
    """Seconds and peak memory of a script; it is killed once a file matches stop_at, (folder, pattern).

    `peak_gb` counts what is mapped from the checkpoint as well, which the system drops when memory is short and reads
    again; `peak_own_gb` does not.
    """
    started, stopped, peak, own = time.perf_counter(), False, 0.0, 0.0
    command = [sys.executable, "-c", LAUNCHER, script, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=workload.RESULTS.parent.parent, stdout=subprocess.DEVNULL
    )  # tables of no meaning
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak, own = max(peak, held(process.pid, "VmHWM")), max(own, held(process.pid, "RssAnon"))
        if stop_at and not stopped and any(stop_at[0].glob(stop_at[1])):
            process.kill()
            stopped = True
        time.sleep(0.05)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if stopped else 0):
        killed = ", killed, as where memory is short" if process.returncode == -signal.SIGKILL else ""
        raise cli.RunError(f"{' '.join(command[3:])} ended with {process.returncode}{killed}")
    if sys.platform == "darwin":  # Linux counts what the parent had at the fork as well
        peak = usage.ru_maxrss / 1e9
    return {"seconds": time.perf_counter() - started, "peak_gb": peak, "peak_own_gb": own}


def held(process, what):
    """GB of memory of a process, by its name in /proc/PID/status; 0 where there is none."""
    status = Path(f"/proc/{process}/status")
    found = re.search(rf"{what}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def train(case, folder, output, *more, stop_at=None):
    """Figures of train.py in a case; `step`: mean seconds of the steps after the first ones."""
    where = ["--model", folder / "model", "--data", folder / "corpus"]
    where += ["--output", output]
    figures = run("train.py", [*where, *TRAINING[kind()], *CASES[case], *more], stop_at)
    steps = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    if kind() == "cuda":
        figures = {"seconds": figures["seconds"], "peak_gb": max(step["memory_gb"] for step in steps)}
    seconds = [step["seconds"] for step in steps]
    return figures | {"step": mean(seconds[WARM:] or seconds[-1:]), "loss": steps[-1]["loss"]}


def measure(case, folder):
    """Figures of each process of a case, by its name. What the case wrote is removed, for the disk's sake."""
    output, figures = folder / "run", {}
    shutil.rmtree(output, ignore_errors=True)
    if case == "resume":
        figures["train.py, killed"] = train(case, folder, output, stop_at=(output / "checkpoints", "step-*.pt"))
        figures["train.py --resume"] = train(case, folder, output, "--resume")
    else:
        figures["train.py"] = train(case, folder, output)
    figures["evaluate.py"] = run("evaluate.py", ["--adapter", output, *EVALUATION[kind()]])
    if kind() == "cuda":  # the process' memory is not the GPU's
        figures["evaluate.py"] = {"seconds": figures["evaluate.py"]["seconds"]}
    shutil.rmtree(output)
    return figures


def kind():
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Settings:
    folder: tyro.conf.Positional[Path]  # for checkpoint, corpus and runs
    only: tuple[Literal[tuple(CASES)], ...] = tuple(CASES)  # these cases


def main():
    settings = cli.parse(Settings, __doc__)
    folder = settings.folder.resolve()
    path = folder / f"figures-{kind()}.json"
    with files.own(folder, "bench.full_size", path.name, ["model", "corpus", "run", path.name], "DIR"):
        figures = json.loads(path.read_text()) if path.exists() else {"written_by": files.signature("bench.full_size")}
        write_figures(path, figures)
        write_inputs(folder, workload.FULL, UTTERANCES)
        for case in settings.only:
            figures[case] = measure(case, folder)
            write_figures(path, figures)
    cases = {case: figures[case] for case in CASES if case in figures}
    show(cases)
    workload.write_result("full_size", {"cases": cases})


def write_figures(path, figures):
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1))


def show(cases):
    """Print seconds and memory of each process, and on a GPU the hours of the paper's run at the measured rate."""
    keys = {"seconds": 0, "step": 0, "peak_gb": 1, "peak_own_gb": 1, "loss": 2}
    rows, hours = [], []
    for case, processes in cases.items():
        for name, figures in processes.items():
            cells = [f"{figures[key]:.{digits}f}" if key in figures else "" for key, digits in keys.items()]
            rows.append((f"{case}: {name}", cells))
            if kind() == "cuda" and name == "train.py":
                hours.append(f"{case} {PAPERS_STEPS * figures['step'] / 3600:.1f}")
    columns = ["seconds", "of them a step", "peak GB", "without mapped", "loss"]
    cli.show_table("The full-size model", columns, rows, numbers=False)
    if hours:
        cli.say(f"hours for three epochs of 5,000 examples at these rates: {', '.join(hours)}")


if __name__ == "__main__":
    cli.run_script("bench.full_size", main)
