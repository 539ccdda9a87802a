"""One optimiser step: transformers' Trainer and this project's loop, side by side.

    python -m bench.train_step                    # on a CPU: a model scaled down in all its proportions
    python -m bench.train_step --data CORPUS      # real recordings instead of noise of the same lengths
    python -m bench.train_step --full             # on a CUDA GPU: the full-size model in bfloat16, and variants of ours

All train the same model on the same 64 utterances a step, half of them for each task, with the same LoRA, optimiser,
rate and clipping, and without dropout, so that their losses have to agree. Each run is a process of its own, and the
contestants take turns. A process does one step to warm up, on other utterances, and then the same step twice: "new"
recordings have not been embedded before, "known" ones have, which makes a difference to this project alone. Over the
paper's three epochs an example's recording is new once in six times.
"""

from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench import workload
from bench.workload import clock, spread
import data
import model as models
from support import cli
from support.run import peak_memory
import train

STEP = 64  # examples, each of another utterance; paper 4.2
MICRO_BATCH, RATE, CLIP = 8, 2e-5, 1.0  # paper 4.2; clipping as in train.py
NEW = 1 / 6  # share of an example's uses, over three epochs of two tasks, in which its recording is new
SEED = 0


# ----------------------------------------------------------------------------------------------------------------------
# The contestants: each takes a model with its LoRA and the steps' examples, and returns a list of dicts, one a step


def ours(model, steps, folder, compiled=False, checkpointing=False):
    """The loop of train.py."""
    if checkpointing:
        model.core.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for layer in model.core.model.layers:
            layer.compile(dynamic=True)
    weights = models.trained_parameters(model)
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0, fused=True)
    model.keep_audio = True
    model.train()
    measured = []
    for step in steps:
        started = clock()
        line = train.train_step(model, weights, optimiser, step, MICRO_BATCH, CLIP)
        measured.append(line | {"seconds": clock() - started})
    return measured


class Plain(nn.Module):
    """The model's own forward and loss, with the control tokens' vectors: what Trainer trains is what ours does.

    unpadded: behind audio embeddings that do not depend on the other recordings.
    """

    def __init__(self, model, unpadded):
        super().__init__()
        self.model, self.unpadded, self.config = model, unpadded, model.core.config

    def forward(self, input_ids, audio_input_features, audio_attention_mask, audio_embed_sizes, **rest):
        model = self.model
        if self.unpadded:
            frames = audio_attention_mask.sum(dim=1).tolist()
            audio = models.encode_audio(model.audio, [f[:n] for f, n in zip(audio_input_features, frames)])
            embeds = model.embed(input_ids, audio)
        else:
            embeds = model.embed(input_ids.masked_fill(input_ids == model.audio_id, model.pad_id), [])
            embeds = model.audio(input_ids, embeds, audio_input_features, audio_embed_sizes, audio_attention_mask)
        return model.core(inputs_embeds=embeds, **rest)


def trainer(model, steps, folder, unpadded=False, checkpointing=False):
    """transformers.Trainer with a plain collator and the model's own forward and loss."""
    examples = [example for step in steps for example in step]
    collated, times = [], []

    def collate(rows):
        batch = plain_batch([examples[row["index"]] for row in rows], model)
        collated.append((batch["attention_mask"].numel(), int(batch["attention_mask"].sum())))
        return batch

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(clock())

        def on_step_end(self, *args, **kwargs):
            times.append(clock())

    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=STEP // MICRO_BATCH,
        max_steps=len(steps),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        logging_steps=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=checkpointing,
    )
    run = Trainer(
        Plain(model, unpadded),
        arguments,
        data_collator=collate,
        train_dataset=[{"index": i} for i in range(len(examples))],
        callbacks=[Clock()],
    )
    run.train()
    measured = []
    for i, line in enumerate(run.state.log_history[: len(steps)]):
        computed, tokens = map(sum, zip(*collated[i * STEP // MICRO_BATCH : (i + 1) * STEP // MICRO_BATCH]))
        measured.append(
            {
                "loss": line["loss"],
                "gradient_norm": line["grad_norm"],
                "tokens": tokens,
                "padding": 1 - tokens / computed,
                "seconds": times[i + 1] - times[i],
            }
        )
    return measured


def plain_batch(examples, model):
    """What the model's own forward takes: padded ids, labels and features."""
    ids = [torch.tensor(example.prompt_ids + example.answer_ids) for example in examples]
    labels = [torch.tensor([data.IGNORE] * len(e.prompt_ids) + e.answer_ids) for e in examples]
    # One at a time: the extractor fails on some sets of lengths
    features = [torch.as_tensor(data.log_mel(example.utterance, model.extractor)) for example in examples]
    frames = torch.tensor([len(feature) for feature in features])
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=model.pad_id),  # (B, T)
        "labels": pad_sequence(labels, batch_first=True, padding_value=data.IGNORE),  # (B, T)
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),  # (B, T)
        "audio_input_features": pad_sequence(features, batch_first=True),  # (B, longest F, 80)
        "audio_attention_mask": torch.arange(max(frames)) < frames[:, None],  # (B, longest F)
        "audio_embed_sizes": torch.tensor([example.utterance.audio_tokens for example in examples]),
    }


CONTESTANTS = {
    "Trainer": (trainer, {}),
    "Trainer, audio unpadded": (trainer, {"unpadded": True}),
    "ours": (ours, {}),
    "ours, torch.compile": (ours, {"compiled": True}),
    "Trainer, gradient checkpointing": (trainer, {"checkpointing": True}),
    "ours, gradient checkpointing": (ours, {"checkpointing": True}),
    "ours, NF4": (ours, {}),
    "ours, flash attention": (ours, {}),
}
QUANTISED, FLASH = "ours, NF4", "ours, flash attention"  # these need another model
ON_A_CPU = ("Trainer", "Trainer, audio unpadded", "ours", "ours, torch.compile")


def why_not(name):
    """Why a contestant cannot run here, or None."""
    for needed, package in ((QUANTISED, "bitsandbytes"), (FLASH, "flash_attn")):
        if name == needed and not workload.installed(package):
            return f"{package} is not installed"
    if not torch.cuda.is_available() and name not in ON_A_CPU:
        return "no CUDA GPU"


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def new_model(name, full, texts):
    shape = "full" if full else "scaled"
    model = workload.new_model(shape, texts, nf4=name == QUANTISED)
    if name == FLASH:
        model.core.set_attn_implementation({"": "flash_attention_2", "audio_config": "sdpa", "vision_config": "sdpa"})
    models.add_adapter(model, workload.RANK[shape], 2 * workload.RANK[shape], dropout=0.0)
    models.set_trainable(model, "lora")
    return model


def measure(name, corpus, full):
    """One contestant's run, as a dict."""
    utterances = data.read_corpus(Path(corpus), "train", limit=2 * STEP)
    model = new_model(name, full, workload.texts_of(utterances))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # building the model is not measured
    pairs = data.make_examples(utterances, model.tokenizer, model.audio_id)
    examples = [pairs[2 * i + i % 2] for i in np.random.default_rng(SEED).permutation(len(utterances))]
    contestant, how = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        steps = contestant(model, [examples[:STEP], examples[STEP:], examples[STEP:]], folder, **how)
    return {"steps": steps, "peak_gb": peak_memory()}


def compare(names, runs, corpus, full):
    """Run the contestants in turn, each in a process of its own; returns {name: list of runs}."""
    found = {name: [] for name in names}
    for number in range(runs):
        for name in names:
            with tempfile.NamedTemporaryFile() as file:
                command = [
                    sys.executable,
                    "-m",
                    "bench.train_step",
                    "--alone",
                    name,
                    "--data",
                    corpus,
                    "--result",
                    file.name,
                ]
                subprocess.run(command + ["--full"] * full, check=True, stdout=subprocess.DEVNULL)
                run = json.loads(Path(file.name).read_text())
            _, new, known = run["steps"]
            print(
                f"run {number + 1}, {name}: new {new['seconds']:.2f} s, known {known['seconds']:.2f} s, "
                f"loss {new['loss']:.6f}, peak {run['peak_gb']:.2f} GB",
                flush=True,
            )
            found[name].append(run)
    return found


@dataclass
class Settings:
    data: str | None = None  # corpus folder; not given: noise of the corpus' lengths
    full: bool = False  # the full-size model; needs a CUDA GPU
    runs: cli.Count = 5  # of each contestant
    contestants: tuple[Literal[tuple(CONTESTANTS)], ...] = tuple(CONTESTANTS)
    alone: Literal[tuple(CONTESTANTS)] | None = None  # measure this one in this process: what the runs are started with
    result: Path | None = None  # with --alone: file for its figures


def main():
    settings = cli.parse(Settings, __doc__)
    if settings.full and not torch.cuda.is_available():
        raise cli.InputError("--full needs a CUDA GPU and this machine has none: leave it out for the scaled model")
    if settings.data:
        data.find_corpus(settings.data, None)
    if settings.alone:
        settings.result.write_text(json.dumps(measure(settings.alone, settings.data, settings.full)))
        return
    skipped = {name: reason for name in settings.contestants if (reason := why_not(name))}
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        if settings.data is None:
            workload.write_corpus(Path(folder), 2 * STEP)
        names = [name for name in settings.contestants if name not in skipped]
        runs = compare(names, settings.runs, settings.data or folder, settings.full)
    show(runs)
    name = "full" if settings.full else "scaled"
    corpus = "speechocean762" if settings.data else "noise"
    workload.write_result(f"train_step-{name}", {"corpus": corpus, "skipped": skipped, "runs": runs})


def show(runs):
    """Print seconds of a step in each contestant's runs, and how many times faster than Trainer beside it."""
    of_three_epochs = {
        name: [NEW * run["steps"][1]["seconds"] + (1 - NEW) * run["steps"][2]["seconds"] for run in found]
        for name, found in runs.items()
    }
    rows = []
    for name, found in runs.items():
        _, new, known = zip(*(run["steps"] for run in found))
        ratios = [t / o for t, o in zip(of_three_epochs.get("Trainer", []), of_three_epochs[name])]
        seconds = [spread([step["seconds"] for step in steps]) for steps in (new, known)]
        peak = spread([run["peak_gb"] for run in found])
        rows.append((name, [*seconds, spread(ratios) if ratios else "", f"{known[0]['padding']:.1%}", peak]))
    columns = ["new, s", "known, s", "times Trainer", "padding", "peak GB"]
    cli.show_table("A step of 64 examples: medians (and ranges)", columns, rows, numbers=False)


if __name__ == "__main__":
    cli.run_script("bench.train_step", main)
