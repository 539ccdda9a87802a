"""One optimiser step: transformers' Trainer, TRL's SFTTrainer and this project's loop, side by side.

    python bench/train_step.py                    # on a CPU: a model scaled down in all its proportions, ten minutes
    python bench/train_step.py --data CORPUS      # real recordings instead of noise of the same lengths
    python bench/train_step.py --full             # on a CUDA GPU: the full-size model in bfloat16

All train the same model on the same 64 examples a step (32 utterances of ordinary lengths, both tasks), with the same
LoRA, optimiser, rate and clipping, and no dropout, so that their losses have to agree. Each run is a process of its
own, and the contestants take turns. A process does one step to warm up and then two steps that are timed, on the same
64 examples: in the first one no recording has been embedded, in the second one this project finds all embeddings on
disk. Over the paper's three epochs an example is of the first kind once in six times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import workload  # first: it finds the project

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

import data
import model as models
import runtime
import train

STEPS = 3  # a warm-up, all recordings new, all recordings known
UTTERANCES = 32  # of a step, both tasks each
BATCH, ACCUMULATION, RATE, CLIP = 8, 8, 2e-5, 1.0  # paper 4.2; clipping as train.py's
SEED = 0


# ----------------------------------------------------------------------------------------------------------------------
# The contestants: each takes a model with its LoRA and the steps' examples, and returns a list of dicts, one a step


def ours(model, steps, folder, options):
    """The loop of train.py."""
    settings = SimpleNamespace(micro_batch=BATCH, clip=CLIP, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    weights = models.trained_parameters(model)
    optimiser = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0)
    model.train()
    measured = []
    for number, examples in enumerate(steps, 1):
        started = clock()
        line = train.train_step(model, weights, optimiser, examples, number, settings)
        measured.append(line | {"seconds": clock() - started})
    return measured


def trainer(model, steps, folder, options):
    """transformers.Trainer as it is, with a plain collator and the model's own forward and loss."""
    return run_trainer(Trainer, TrainingArguments, model, steps, folder, options)


def sft_trainer(model, steps, folder, options):
    """TRL's SFTTrainer, told that the examples are prepared already, which it cannot do for audio."""
    from trl import SFTConfig, SFTTrainer

    return run_trainer(SFTTrainer, SFTConfig, model, steps, folder, options, processing_class=model.tokenizer,
                       how={"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None})  # fmt: skip


CONTESTANTS = {"Trainer": trainer, "SFTTrainer": sft_trainer, "ours": ours}


def run_trainer(trainer_class, arguments_class, model, steps, folder, options, how=None, **more):
    collated, times = [], []

    def collate(examples):
        batch = plain_batch(examples, model)
        collated.append((batch["attention_mask"].numel(), int(batch["attention_mask"].sum())))
        return batch

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(clock())

        def on_step_end(self, *args, **kwargs):
            times.append(clock())

    arguments = arguments_class(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, max_steps=len(steps),
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP, logging_steps=1,
        train_sampling_strategy="sequential", remove_unused_columns=False, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        gradient_checkpointing=options.gradient_checkpointing, **(how or {}),
    )  # fmt: skip
    examples = [{"example": example} for step in steps for example in step]
    trainer = trainer_class(model.network, arguments, train_dataset=examples, data_collator=collate,
                            callbacks=[Clock()], **more)  # fmt: skip
    trainer.train()
    measured = []
    for i, line in enumerate(trainer.state.log_history[: len(steps)]):
        computed, tokens = map(sum, zip(*collated[i * ACCUMULATION : (i + 1) * ACCUMULATION]))
        measured.append({"loss": line["loss"], "gradient_norm": line["grad_norm"], "tokens": tokens,
                         "padding": 1 - tokens / computed, "seconds": times[i + 1] - times[i]})  # fmt: skip
    return measured


def plain_batch(rows, model):
    """What the model's own forward takes: padded ids, labels and features."""
    examples = [row["example"] for row in rows]
    batch = {key: torch.as_tensor(value) for key, value in data.collate(examples, model.pad_id).items()}
    # One at a time: the extractor fails on some sets of lengths
    features = [torch.as_tensor(data.log_mel(example.utterance, model.extractor)) for example in examples]
    frames = torch.tensor([len(feature) for feature in features])
    return batch | {
        "audio_input_features": pad_sequence(features, batch_first=True),  # (B, longest F, 80)
        "audio_attention_mask": torch.arange(max(frames)) < frames[:, None],  # (B, longest F)
        "audio_embed_sizes": torch.tensor([example.utterance.audio_tokens for example in examples]),
    }


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(options):
    """One contestant's run, as a dict."""
    utterances = data.read_corpus(options.data, "train", limit=2 * UTTERANCES)
    shape = "full" if options.full else "scaled"
    model = workload.new_model(shape, workload.texts_of(utterances))
    models.add_adapter(model, workload.RANK[shape], 2 * workload.RANK[shape], dropout=0.0)
    models.set_trainable(model, "lora")
    examples = [e for u in utterances for e in data.make_examples(u, model.tokenizer, model.audio_id)]
    half = len(examples) // 2
    order = np.random.default_rng(SEED).permutation(half)
    warm_up, step = ([examples[start + i] for i in order] for start in (0, half))
    with tempfile.TemporaryDirectory() as folder:
        steps = CONTESTANTS[options.contestant](model, [warm_up, step, step], folder, options)
    return {"steps": steps, "peak_gb": runtime.peak_memory()}


def compare(options):
    """Run the contestants in turn, each in a process of its own; returns {name: list of runs}."""
    runs = {name: [] for name in options.contestants}
    for number in range(options.runs):
        for name in options.contestants:
            with tempfile.NamedTemporaryFile() as file:
                command = [sys.executable, __file__, "--contestant", name, "--data", options.data, "--result", file.name]
                subprocess.run(command + ["--full"] * options.full, check=True, stdout=subprocess.DEVNULL)
                runs[name].append(json.loads(Path(file.name).read_text()))
            seconds = ", ".join(f"{step['seconds']:.2f}" for step in runs[name][-1]["steps"])
            print(f"run {number + 1}: {name}: {seconds} s, loss {runs[name][-1]['steps'][0]['loss']:.6f}, "
                  f"peak {runs[name][-1]['peak_gb']:.2f} GB")
    return runs


def main():
    parser = data.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--contestant")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--result")
    options = parser.parse_args()
    if options.contestant:
        Path(options.result).write_text(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload.write_corpus(Path(folder), 2 * UTTERANCES)
            options.data = folder
        runs = compare(options)
    print(json.dumps(runs)[:300])


if __name__ == "__main__":
    data.run_script("train_step.py", main)
