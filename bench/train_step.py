"""One optimiser step: transformers' Trainer, TRL's SFTTrainer and this project's loop, side by side.

    python bench/train_step.py                    # on a CPU: a model scaled down in all its proportions, 40 minutes
    python bench/train_step.py --data CORPUS      # real recordings instead of noise of the same lengths
    python bench/train_step.py --full             # on a CUDA GPU: the full-size model in bfloat16, and variants of ours

All train the same model on the same 64 utterances a step, half of them for each task, with the same LoRA, optimiser,
rate and clipping, and without dropout, so that their losses have to agree. Each run is a process of its own, and the
contestants take turns. A process does one step to warm up, on other utterances, and then the same step twice: "new"
recordings have not been embedded before, "known" ones have, which makes a difference to this project alone. Over the
paper's three epochs an example's recording is new once in six times.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import workload  # first: it finds the project
from workload import clock

# isort: split
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

import data
import loader
import model as models
import runtime
import train
from support import cli

STEP = 64  # examples, each of another utterance; paper 4.2
MICRO_BATCH, RATE, CLIP = 8, 2e-5, 1.0  # paper 4.2; clipping as in train.py
WORKERS = models.default_workers()
SEED = 0


# ----------------------------------------------------------------------------------------------------------------------
# The contestants: each takes a model with its LoRA and the steps' examples, and returns a list of dicts, one a step


def ours(model, steps, folder, compiled=False, checkpointing=False):
    """The loop of train.py."""
    if checkpointing:
        model.core.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        model.compile_layers()
    settings = SimpleNamespace(micro_batch=MICRO_BATCH, clip=CLIP, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    weights = models.trained_parameters(model)
    optimiser = train.new_optimiser(weights, settings)
    optimiser.param_groups[0]["lr"] = RATE
    model.keep_audio(folder)
    model.train()
    examples = [example for step in steps for example in step]
    indices = np.arange(len(examples)).reshape(len(steps), -1)
    measured, ended = [], clock()
    with loader.load_steps(examples, indices, MICRO_BATCH, model.prepare, WORKERS) as prepared:
        for number, (supervised, share) in enumerate(prepared, 1):
            line = train.train_step(model, weights, optimiser, supervised, share, number, settings)
            started, ended = ended, clock()
            line["work"] = sum(operations(model, micro_batch) for micro_batch in share)
            measured.append(line | {"seconds": ended - started})
    return measured


def trainer(model, steps, folder, unpadded=False, checkpointing=False):
    """transformers.Trainer with a plain collator and the model's own forward and loss."""
    return run_trainer(Trainer, TrainingArguments, model, steps, folder, unpadded, checkpointing)


def sft_trainer(model, steps, folder):
    """TRL's SFTTrainer. It prepares text alone, so it is told that the examples are ready.

    Its head needs an attribute that PEFT's wrapper, which trains the control tokens' rows, does not pass on.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model.core.lm_head.bias = None
    return run_trainer(
        SFTTrainer,
        SFTConfig,
        model,
        steps,
        folder,
        processing_class=model.tokenizer,
        as_dataset=Dataset.from_list,
        how={"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None},
    )


CONTESTANTS = {
    "Trainer": (trainer, {}),
    "Trainer, audio unpadded": (trainer, {"unpadded": True}),
    "SFTTrainer": (sft_trainer, {}),
    "ours": (ours, {}),
    "ours, torch.compile": (ours, {"compiled": True}),
    "Trainer, gradient checkpointing": (trainer, {"checkpointing": True}),
    "ours, gradient checkpointing": (ours, {"checkpointing": True}),
    "ours, NF4": (ours, {}),
    "ours, flash attention": (ours, {}),
}
QUANTISED, FLASH = "ours, NF4", "ours, flash attention"  # these need another model
ON_A_CPU = ("Trainer", "Trainer, audio unpadded", "SFTTrainer", "ours", "ours, torch.compile")


def why_not(name):
    """Why a contestant cannot run here, or None."""
    for needed, package in (("SFTTrainer", "trl"), (QUANTISED, "bitsandbytes"), (FLASH, "flash_attn")):
        if name == needed and not workload.installed(package):
            return f"{package} is not installed"
    if not torch.cuda.is_available() and name not in ON_A_CPU:
        return "no CUDA GPU"


class Unpadded(nn.Module):
    """The model's own forward and loss behind audio embeddings that do not depend on the other recordings."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.core.config

    def forward(self, input_ids, audio_input_features, audio_attention_mask, audio_embed_sizes, **rest):
        frames = audio_attention_mask.sum(dim=1).tolist()
        with torch.no_grad():
            audio = self.model.embed_audio([f[:length] for f, length in zip(audio_input_features, frames)])
        embeds = self.model.core.get_input_embeddings()(input_ids)
        placeholders = (input_ids == self.model.audio_id)[..., None]
        return self.model.core(inputs_embeds=embeds.masked_scatter(placeholders, torch.cat(audio).to(embeds)), **rest)


def run_trainer(
    trainer_class,
    arguments_class,
    model,
    steps,
    folder,
    unpadded=False,
    checkpointing=False,
    as_dataset=list,
    how=None,
    **more,
):
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
    arguments = arguments_class(
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
        **(how or {}),
    )
    run = trainer_class(
        Unpadded(model) if unpadded else model.network,
        arguments,
        data_collator=collate,
        train_dataset=as_dataset([{"index": i} for i in range(len(examples))]),
        callbacks=[Clock()],
        **more,
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
    batch = {key: torch.as_tensor(value) for key, value in data.collate(examples, model.pad_id).items()}
    lengths = torch.tensor([len(example) for example in examples])
    # One at a time: the extractor fails on some sets of lengths
    features = [torch.as_tensor(data.log_mel(example.utterance, model.extractor)) for example in examples]
    frames = torch.tensor([len(feature) for feature in features])
    return batch | {
        "attention_mask": (torch.arange(max(lengths)) < lengths[:, None]).long(),
        "audio_input_features": pad_sequence(features, batch_first=True),  # (B, longest F, 80)
        "audio_attention_mask": torch.arange(max(frames)) < frames[:, None],  # (B, longest F)
        "audio_embed_sizes": torch.tensor([example.utterance.audio_tokens for example in examples]),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Counting


def operations(model, batch):
    """Multiplications and additions that a micro-batch needs in forward and backward pass, audio encoder left out.

    Frozen weights need no gradient of their own: two products a token, of LoRA's three. Attention is causal; its
    backward pass has five products for the forward pass' two.
    """
    rows, longest = batch.input_ids.shape
    per_token = 0
    for name, parameter in model.core.model.layers.named_parameters():
        if parameter.ndim == 2:  # stored as bytes of two values each where quantised
            count = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
            per_token += count * (3 if parameter.requires_grad else 2)
    config = model.core.config
    attention = 7 * rows * longest**2 / 2 * config.hidden_size * config.num_hidden_layers
    head = 2 * len(batch.supervised) * config.vocab_size * config.hidden_size
    return 2 * (per_token * rows * longest + attention + head)


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
    utterances = data.read_corpus(corpus, "train", limit=2 * STEP)
    model = new_model(name, full, workload.texts_of(utterances))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # building the model is not measured
    pairs = data.Examples(utterances, model.tokenizer, model.audio_id)
    examples = [pairs[2 * i + i % 2] for i in np.random.default_rng(SEED).permutation(len(utterances))]
    contestant, how = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        steps = contestant(model, [examples[:STEP], examples[STEP:], examples[STEP:]], folder, **how)
    return {"steps": steps, "peak_gb": runtime.peak_memory()}


def compare(names, runs, corpus, full):
    """Run the contestants in turn, each in a process of its own; returns {name: list of runs}."""
    found = {name: [] for name in names}
    for number in range(runs):
        for name in names:
            with tempfile.NamedTemporaryFile() as file:
                command = [sys.executable, __file__, "--alone", name, "--data", corpus, "--result", file.name]
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


def main():
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="corpus folder (default: noise of the corpus' lengths)")
    parser.add_argument("--full", action="store_true", help="the full-size model; needs a CUDA GPU")
    parser.add_argument("--runs", type=cli.positive_int, default=5, help="of each contestant (5)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help=", ".join(CONTESTANTS),
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full and not torch.cuda.is_available():
        parser.error("--full needs a CUDA GPU and this machine has none: leave it out for the scaled model")
    if options.data:
        data.find_corpus(options.data, None)
    if options.alone:
        options.result.write_text(json.dumps(measure(options.alone, options.data, options.full)))
        return
    skipped = {name: reason for name in options.contestants if (reason := why_not(name))}
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload.write_corpus(Path(folder), 2 * STEP)
        names = [name for name in options.contestants if name not in skipped]
        runs = compare(names, options.runs, options.data or folder, options.full)
    dtype, size = (torch.bfloat16, 8192) if torch.cuda.is_available() else (torch.float32, 2048)
    name = "full" if options.full else "scaled"
    workload.write_result(
        f"train_step-{name}",
        {
            "model": name,
            "corpus": "speechocean762" if options.data else "noise",
            "trl": importlib.metadata.version("trl") if workload.installed("trl") else None,
            "matrix_peak": workload.matrix_peak(dtype, size),
            "skipped": skipped,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    cli.run_script("train_step.py", main)
