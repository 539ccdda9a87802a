"""What a larger corpus costs: time until the first step, and memory.

    python bench/scaling.py                # 250 to 50,000 utterances by repetition, ten minutes and 5 GB of disk

A corpus of each size is read, checked, and one step is made, as train.py does it, with the scaled model. Then audio
embeddings of the whole corpus are written to disk and read in the order of an epoch. Each size is a process of its
own. "held" is memory of the process' own before the step and after all that; pages of files that the system keeps are
not in it. Linux only.
"""

import ctypes
from dataclasses import dataclass
import gc
import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile

import workload  # first: it finds the project
from workload import clock

# isort: split
import numpy as np
import torch

import data
import model as models
from support import cli, files, memory
from support.workers import load_steps
import train

SIZES = (250, 1_000, 5_000, 50_000)
STEP, MICRO_BATCH, SEED = 64, 8, 0  # as in train.py
WORKERS = 2 if torch.cuda.is_available() else 0
MOST_TOKENS = 2048  # of an example, train.py's --max-tokens


def repeat(source, folder, utterances):
    """A corpus folder with `utterances` of the source's train part, over and over, under new names."""
    source, folder = Path(source), Path(folder)
    recordings, speakers, records = [], [], {}
    originals = [line.split() for line in files.read_text(source / "train" / "wav.scp").splitlines()]
    owner = dict(line.split() for line in files.read_text(source / "train" / "utt2spk").splitlines())
    labels = files.read_json(source / "resource" / "scores.json", dict)
    for number in range(utterances):
        id, path = originals[number % len(originals)]
        name = f"{number:06d}"
        recordings.append(f"{name}\t{source / path}")
        speakers.append(f"{name} {owner[id]}")
        records[name] = labels[id]
    (folder / "train").mkdir(parents=True)
    (folder / "resource").mkdir()
    (folder / "resource" / "scores.json").write_text(json.dumps(records))
    for name, lines in (("wav.scp", recordings), ("utt2spk", speakers)):
        (folder / "train" / name).write_text("\n".join(lines) + "\n")


def held():
    """Memory of the process' own, in GB, without what it has freed and the C library keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def measure(folder):
    """Time and memory of one corpus, as a dict."""
    started = clock()
    utterances = data.read_corpus(folder, "train")
    data.describe(utterances), data.fingerprint(utterances)
    read = clock()
    model = workload.new_model("scaled", workload.texts_of(utterances[:250]))
    models.add_adapter(model, workload.RANK["scaled"], 2 * workload.RANK["scaled"], dropout=0.0)
    models.set_trainable(model, "lora")
    built = clock()
    examples = train.make_examples(utterances, model, MOST_TOKENS)
    checked, started_gb = clock(), held()
    with tempfile.TemporaryDirectory() as cache:
        model.keep_audio(cache)
        weights = models.trained_parameters(model)
        optimiser = torch.optim.AdamW(weights.values(), fused=True)
        # the same step for every size: the recordings that are repeated
        order = data.epoch_steps(min(len(examples), SIZES[0]), STEP, SEED, epoch=1)
        with load_steps(examples, order, MICRO_BATCH, model.prepare, WORKERS) as prepared:
            supervised, micro_batches = next(prepared)
        train.train_step(model, weights, optimiser, micro_batches, supervised, clip=1.0, number=1)
        stepped = clock()
        embed(model, utterances)
    return {
        "read": read - started,
        "check": checked - built,
        "first_step": stepped - checked,
        "started_gb": started_gb,
        "held_gb": held(),
        "peak_gb": memory.peak(),
    }


def embed(model, utterances):
    """Write an embedding for every utterance, as if all recordings differed, and read them all at random."""
    cache, width = model.prepare.cache, model.core.config.hidden_size
    files = (cache.file(utterance.id.encode()) for utterance in utterances)
    for file, utterance in zip(files, utterances):
        cache.write(file, torch.zeros(utterance.audio_tokens, width))
    for index in np.random.default_rng(SEED).permutation(len(utterances)):
        embeddings = cache.read(cache.file(utterances[index].id.encode()))
        assert embeddings.shape == (utterances[index].audio_tokens, width)


@dataclass
class Settings:
    data: str | None = None  # corpus folder to repeat; not given: noise of the corpus' lengths
    sizes: tuple[cli.Count, ...] = SIZES  # utterances
    alone: Path | None = None  # measure this corpus in this process: what the sizes are started with


def main():
    settings = cli.parse(Settings, __doc__)
    if settings.alone:
        print(json.dumps(measure(settings.alone)))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if settings.data is None:
            workload.write_corpus(Path(folder) / "source", SIZES[0])
        for size in settings.sizes:
            corpus = Path(folder) / str(size)
            repeat(Path(settings.data or Path(folder) / "source").resolve(), corpus, size)
            command = [sys.executable, __file__, "--alone", str(corpus)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[size] = json.loads(result.stdout.splitlines()[-1])
            print(f"{size:,} utterances: " + ", ".join(f"{key} {value:.2f}" for key, value in figures[size].items()))
    corpus = "speechocean762" if settings.data else "noise"
    workload.write_result("scaling-scaled", {"model": "scaled", "corpus": corpus, "sizes": figures})


if __name__ == "__main__":
    cli.run_script("scaling.py", main)
