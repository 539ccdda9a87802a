"""Fine-tune Phi-4-multimodal on speechocean762 (paper 3.2, 4.2), with a plain PyTorch loop.

    python train.py --rank 64 --epochs 3                              # the paper's run: fetches model and corpus
    python train.py --rank 64 --epochs 3 --resume                     # the same, after it was stopped
    torchrun --nproc-per-node 4 train.py --rank 64 --epochs 3         # the same on four GPUs
    python train.py --rank 64 --epochs 1 --limit 10 --output check    # ten utterances, before a long run
    python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --learning-rate 3e-3   # on a laptop

Writes into --output: settings.json, log.jsonl (one line a step), an adapter per epoch, checkpoints/ for --resume and
curves.png. Then: evaluate.py.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import shutil
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveInt
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import loader
import metrics
import model as models
import prompts
import runtime
from support import cli, files

FRESH_LORA = ("rank", "alpha", "dropout")  # settings of an adapter that starts from nothing
# What may differ when a run is resumed. The corpus has to be the same, but may lie elsewhere.
MAY_CHANGE = (
    "output",
    "resume",
    "save_minutes",
    "micro_batch",
    "gradient_checkpointing",
    "max_tokens",
    "patience",
    "track",
    "data",
    "data_revision",
    "audio_cache",
    "workers",
    "compile",
)
# What a run writes into --output
WRITTEN = ("settings.json", "log.jsonl", "validation.jsonl", "curves.png", "epoch-*", "checkpoints/step-*.pt")
ESTIMATE_AFTER = 10  # steps
MOST_WORKERS = 64  # two keep a GPU busy; thousands bring a machine down
COMPILERS = ("g++", "clang++", "c++")
VALIDATION_SHOWN = {"loss": "loss"} | {name: f"{name}_pcc" for name in prompts.SCORES} | {"WER": "wer", "PER": "per"}


class RunSettings(files.Shape):
    """What tells that a settings.json is a run's."""

    strategy: str
    speech_adapter: str
    epochs: PositiveInt
    seed: int


# ----------------------------------------------------------------------------------------------------------------------
# Settings: each declared once, shown by --help, printed, and saved beside the adapter


def parse_settings():
    """The command line as a namespace. Raises InputError when a value is wrong or two cannot work together."""
    parser = cli.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        usage="python train.py [settings]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data (paper 4.1)").add_argument
    add("--data", default=data.HUB_CORPUS, help="corpus folder in the release's layout, or hub id")
    add("--data-revision", default=data.HUB_CORPUS_REVISION, help="of the hub id; the labels changed in April 2026")
    add("--limit", type=cli.positive_int, help="use only the first N utterances")

    add(
        "--validation",
        type=cli.fraction,
        default=0.0,
        help="share of the training speakers held out, to choose an epoch by",
    )
    add("--max-tokens", type=cli.positive_int, default=2048, help="an example longer than this is an error, never cut")

    add = parser.add_argument_group("model (paper 3.2)").add_argument
    add("--model", default=models.HUB_MODEL, help="checkpoint folder or hub id")
    add("--revision", default=models.HUB_MODEL_REVISION, help="of the hub id: transformers' own format")
    add(
        "--strategy",
        choices=models.STRATEGIES,
        default="lora",
        help="what trains: LoRA alone, audio encoder and projector as well, or all weights of these and of the "
        "language model, without LoRA",
    )
    add(
        "--speech-adapter",
        choices=models.SPEECH_ADAPTERS,
        default="merge",
        help="the shipped one: fold it into the "
        "frozen weights and train a fresh LoRA, train it on at its own rank (the paper's wording), or leave it out",
    )
    add("--rank", type=cli.positive_int, default=64, help="of the fresh LoRA (not in the paper; our choice)")
    add("--alpha", type=cli.positive_int, default=128, help="of the fresh LoRA, scale alpha / rank (our choice)")
    add("--dropout", type=cli.fraction, default=0.05, help="of the fresh LoRA's input (our choice)")
    add("--quantize", choices=("nf4",), help="QLoRA: keep the language model's frozen layers in 4 bits")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of frozen weights; trained ones are float32. auto: bfloat16 on CUDA, float32 on a CPU",
    )
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa", help="implementation")

    add = parser.add_argument_group("optimisation (paper 4.2)").add_argument
    add("--epochs", type=cli.positive_int, default=3, help="passes over the corpus (Table 3 reports 1-4, 3 is best)")
    add("--batch-size", type=cli.positive_int, default=8, help="examples in a micro-batch (paper 4.2)")
    add("--accumulation", type=cli.positive_int, default=8, help="micro-batches in a step (paper 4.2)")
    add("--learning-rate", type=cli.positive_float, default=2e-5, help="peak (paper 4.2)")
    add("--warmup", type=cli.fraction, default=0.03, help="fraction of all steps with linear warmup (our choice)")
    add("--weight-decay", type=cli.fraction, default=0.0, help="AdamW's; 0 makes it the paper's Adam (paper 4.2)")
    add("--betas", type=cli.fraction, nargs=2, default=(0.9, 0.999), help="of AdamW (PyTorch's; not in the paper)")
    add("--epsilon", type=cli.positive_float, default=1e-8, help="of AdamW (PyTorch's; not in the paper)")
    add("--clip", type=cli.positive_float, default=1.0, help="largest norm of a step's gradient (our choice)")
    add("--patience", type=cli.positive_int, help="stop after this many epochs without a lower validation loss")

    add = parser.add_argument_group("memory: what a step computes stays the same").add_argument
    add("--micro-batch", type=cli.positive_int, help="examples computed at once on a device; not given: --batch-size")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add(
        "--compile",
        action="store_true",
        help="join a layer's small operations with torch.compile: faster and smaller "
        "after a minute or two, last digits differ",
    )
    add(
        "--shard",
        action="store_true",
        help="under torchrun: each process holds a part of the weights (FSDP2); --validation then gives the loss alone",
    )

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=cli.seed, default=0, help="of weights, order, dropout and held-out speakers (our choice)")
    add("--output", type=Path, default=Path("out"), help="folder for adapters, settings and log")
    add(
        "--audio-cache",
        type=Path,
        default=Path("audio-cache"),
        help="folder for audio embeddings, computed once "
        "while encoder and projector are frozen; runs share it, and it may be removed",
    )
    add(
        "--workers",
        type=cli.whole_number,
        default=models.default_workers(),
        help="processes that read and prepare "
        "the next steps; without a GPU 0, because they would take their time from the step",
    )
    add("--save-minutes", type=cli.positive_float, default=30.0, help="time between checkpoints within an epoch")
    add("--resume", nargs="?", const="newest", help="go on from the newest checkpoint in --output, or from this file")
    add("--track", choices=("tensorboard", "wandb"), help="show the log there as well")

    settings, given = parser.parse_given()
    settings.betas = list(settings.betas)  # as JSON has it
    if settings.dtype == "auto":
        settings.dtype = models.default_dtype()
    if settings.micro_batch is None:
        settings.micro_batch = settings.batch_size
    parser.refuse(conflicts(settings, given))
    if settings.strategy == "full" or settings.speech_adapter == "continue":
        settings.rank = settings.alpha = settings.dropout = None
    return settings


def conflicts(settings, given):
    """What cannot work together, as (whether it is so, message). given: names of the settings that the user wrote."""
    lora = " ".join(f"--{name}" for name in FRESH_LORA if name in given)
    step_size = settings.batch_size * settings.accumulation
    full, quantized = settings.strategy == "full", settings.quantize is not None
    return [
        (full and lora, f"--strategy full trains no LoRA: leave out {lora}"),
        (
            full and settings.speech_adapter == "continue",
            "--strategy full trains no LoRA, so there is none for --speech-adapter continue: use merge or none",
        ),
        (
            settings.speech_adapter == "continue" and lora,
            f"--speech-adapter continue trains the shipped adapter as it is: leave out {lora}",
        ),
        (
            quantized and full,
            "--quantize nf4 freezes the weights that --strategy full would train: 4 bits hold no small step",
        ),
        (
            quantized and settings.strategy == "unfreeze",
            "--quantize nf4 rounds the language model that --strategy unfreeze fits audio encoder and projector to: they "
            "would learn its rounding; use --strategy lora",
        ),
        (
            settings.shard and not full,
            f"--shard is for --strategy full: each GPU has room for what --strategy {settings.strategy} trains",
        ),
        (
            settings.shard and "RANK" not in os.environ,
            "--shard needs several processes: start it with torchrun --nproc-per-node N",
        ),
        (
            settings.rank > models.LARGEST_RANK,
            f"--rank {settings.rank} is above {models.LARGEST_RANK:,}, the width of "
            f"the model: no change of it needs more",
        ),
        (
            settings.learning_rate > 1,
            f"--learning-rate {settings.learning_rate:g} is above 1: Adam moves every weight "
            f"by about as much in a step",
        ),
        (settings.workers > MOST_WORKERS, f"--workers {settings.workers} is above {MOST_WORKERS}"),
        (
            settings.micro_batch > step_size,
            f"--micro-batch {settings.micro_batch} is more than a step has: "
            f"--batch-size {settings.batch_size} x --accumulation {settings.accumulation}",
        ),
        (
            "data_revision" in given and Path(settings.data).is_dir(),
            f"--data-revision {settings.data_revision} is of a hub id, and --data {settings.data} is a folder",
        ),
        (
            "revision" in given and Path(settings.model).is_dir(),
            f"--revision {settings.revision} is of a hub id, and --model {settings.model} is a folder",
        ),
        (
            settings.patience and not settings.validation,
            f"--patience {settings.patience} needs held-out speakers: add --validation 0.1",
        ),
        (
            settings.attention == "flash_attention_2" and settings.dtype == "float32",
            "--attention flash_attention_2 works in 16 bits, not with --dtype float32 (the default on a CPU)",
        ),
        (
            settings.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)),
            f"--compile needs a C++ compiler where there is no GPU, and finds none: install {' or '.join(COMPILERS)}",
        ),
        *(
            (
                option and importlib.util.find_spec(package) is None,
                f"{option} needs the package {package}, which is not installed: pip install {package.replace('_', '-')}",
            )
            for option, package in (
                (settings.track and f"--track {settings.track}", settings.track or "wandb"),
                (quantized and "--quantize nf4", "bitsandbytes"),
                (settings.attention == "flash_attention_2" and "--attention flash_attention_2", "flash_attn"),
            )
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(settings):
    """One run, from the corpus to the adapters. Raises InputError before anything slow when the input is wrong."""
    choose_checkpoint(settings)  # what is wrong here is said at once, and looked at again when nobody else can write
    settings.revision = models.check_model(settings.model, settings.revision)  # refs/pr/70 moves, a commit does not
    _, settings.data_revision = data.find_corpus(settings.data, settings.data_revision)
    utterances = data.read_corpus(settings.data, "train", settings.data_revision, settings.limit)
    print(f"corpus: {data.describe(utterances)}")
    chosen, held_out = split(utterances, settings)
    plan = batch_arithmetic(len(chosen) * len(prompts.TASKS), settings)
    with files.lock(settings.output, "train", "--output"):
        files.make_folder(settings.output / "checkpoints", "--output")
        files.make_folder(settings.audio_cache, "--audio-cache")
        run(settings, chosen, held_out, plan, data.fingerprint(utterances))


def run(settings, chosen, held_out, plan, corpus):
    """The part of a run that writes into --output.

    chosen, held_out: utterances to train and to validate on; plan: of batch_arithmetic; corpus: its fingerprint.
    """
    given = {key: value for key, value in plain(settings).items() if key not in MAY_CHANGE}
    # Rank 0 looks before any process goes on to write
    (checkpoint, *_) = runtime.gather(None if cli.process_rank() else choose_checkpoint(settings))
    if settings.resume and not checkpoint:
        print(f"no checkpoint in {settings.output}/checkpoints: the run begins at the start")
    state = read_state(checkpoint, given, corpus, plan["steps"]) if checkpoint else None
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(settings.seed)
    model = build_model(settings)
    examples, held_out = (make_examples(part, model, settings.max_tokens) for part in (chosen, held_out))
    record = record_settings(settings)

    # From here on each process has random numbers of its own: dropout differs, the weights do not
    torch.manual_seed(settings.seed + (cli.process_rank() << 32))
    distributed = distribute(model, settings)
    weights = models.trained_parameters(model)
    optimiser = new_optimiser(weights, settings)
    save = partial(
        runtime.save_checkpoint,
        settings.output / "checkpoints",
        weights=weights,
        optimiser=optimiser,
        settings=given,
        corpus=corpus,
    )
    step = resume(state, weights, optimiser) if state else 0
    validated = read_validated(settings.output, step)
    started = saved = time.perf_counter()
    durations = []  # seconds of each step
    model.train()
    with (
        runtime.StopRequest() as stop,
        runtime.open_log(settings.output / "log.jsonl", step) as log,
        runtime.tracker(settings.track, settings.output, record, step) as track,
        tqdm(total=plan["steps"], initial=step, unit="step", disable=cli.process_rank() > 0) as bar,
    ):
        for epoch in range(max(1, math.ceil(step / plan["per_epoch"])), settings.epochs + 1):
            last_step = epoch * plan["per_epoch"]
            order = data.epoch_steps(len(examples), plan["step_size"], settings.seed, epoch)
            left = order[len(order) - (last_step - step) :]
            # Worker processes end with their epoch
            with loader.load_steps(examples, left, settings.micro_batch, model.prepare, settings.workers) as prepared:
                for _ in left:
                    # Learning rate: a function of the step alone
                    rate = runtime.learning_rate(step, plan["steps"], settings.learning_rate, plan["warmup"])
                    for group in optimiser.param_groups:
                        group["lr"] = rate

                    step_started = time.perf_counter()
                    supervised, share = next(prepared)
                    step += 1
                    numbers = train_step(distributed, weights, optimiser, supervised, share, step, settings)
                    durations.append(time.perf_counter() - step_started)

                    # Log
                    moved = models.moved(model) if step == last_step else {}
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "learning_rate": rate,
                        **numbers,
                        "seconds": durations[-1],
                        "tokens_per_second": numbers["tokens"] / durations[-1],
                        "memory_gb": runtime.peak_memory(),
                        **moved,
                    }
                    print(json.dumps(line), file=log, flush=True)
                    track(step, line)
                    bar.update()
                    bar.set_postfix_str(progress(line))
                    if moved:
                        bar.write(f"epoch {epoch}: {models.describe_moved(moved)}")
                    if len(durations) == ESTIMATE_AFTER and step < plan["steps"]:
                        bar.write(estimate(sum(durations), plan["steps"] - step))

                    # Checkpoint; the clock is rank 0's, and a signal to one process stops all
                    overdue = cli.process_rank() == 0 and time.perf_counter() - saved > 60 * settings.save_minutes
                    stopping, due = runtime.total(stop.name is not None, overdue)
                    if stopping or due or step == last_step:
                        save(step)
                        saved = time.perf_counter()
                    if stopping:
                        bar.write(f"stopped after step {step}, which is saved: the same command with --resume goes on")
                        return

            # The end of an epoch. A run that is stopped in here comes here again when it is resumed.
            models.save_trained(model, settings.output / f"epoch-{epoch}", record | {"epoch": epoch})
            if held_out and epoch not in validated:
                validated[epoch] = {"step": step} | validate(model, held_out, settings)
                record_validated(settings.output, validated)
                track(step, {f"validation_{key}": value for key, value in validated[epoch].items()})
            if settings.patience and epoch - best_epoch(validated) >= settings.patience:
                bar.write(
                    f"no lower validation loss for {settings.patience} epochs: stopping early, after epoch {epoch}"
                )
                break
    runtime.draw_curves(settings.output)
    print(f"{step} steps, {time.perf_counter() - started:.0f} s, peak memory {runtime.peak_memory():.1f} GB")
    print(f"adapters in {settings.output}/epoch-*; next: python evaluate.py --adapter {settings.output}/")


def new_optimiser(weights, settings):
    """AdamW over what trains; fused: one pass over weights, gradients and moments, and no copies."""
    return torch.optim.AdamW(
        weights.values(), betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
    )


def train_step(distributed, weights, optimiser, supervised, share, number, settings):
    """One update of the weights. Returns what is logged of it; together.

    supervised: tokens of the whole step; share: this process' list of loader.MicroBatch. Raises RunError, before the
    update, when loss or gradient is not finite.
    """
    # Gradient: the mean over all supervised tokens of the step, however it is cut into micro-batches and shared by
    # processes. PyTorch averages over processes where a sum is needed, hence the factor.
    losses = []
    with memory_advice(share, settings):
        for micro_batch in share:
            with synchronised(distributed, last=micro_batch is share[-1]):
                with runtime.autocast():
                    loss = distributed(micro_batch) / supervised
                (loss * runtime.processes()).backward()
            losses.append(loss.detach())

        loss, tokens, computed = runtime.total(sum(losses), *count_tokens(share))
        not_finite = partial(step_not_finite, number, share, losses)
        gradient_norm = runtime.update(optimiser, weights.values(), loss, settings.clip, not_finite)
    return {
        "loss": loss,
        "gradient_norm": gradient_norm,
        "supervised_tokens": supervised,
        "tokens": int(tokens),
        "padding": 1 - tokens / computed,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop


def plain(settings):
    """Settings as JSON has them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}


def choose_checkpoint(settings):
    """The file to go on from, or None for a run from the start. Raises InputError when --output holds something else.

    That is, without --resume any file of a run, and with it files of these names that train.py did not write.
    """
    run = settings.output
    there = [path for name in WRITTEN for path in sorted(run.glob(name))] if run.is_dir() else []
    there = [path for path in there if path.suffix != files.UNFINISHED]
    found = [path for path in there if path.parent != run]
    if there and not settings.resume:
        raise cli.InputError(
            f"{there[0]} is there already: --resume goes on with the run in {run}, another --output leaves it be"
        )
    if run / "settings.json" in there or there and not found:  # a run writes it before all else
        files.read_json(run / "settings.json", RunSettings)
    if settings.resume is None:
        return None
    if settings.resume != "newest":
        if not Path(settings.resume).is_file():
            raise cli.InputError(
                f"checkpoint {settings.resume} is missing; {run} has {', '.join(map(str, found)) or 'none'}"
            )
        return Path(settings.resume)
    return found[-1] if found else None


def read_state(path, given, corpus, steps):
    """A checkpoint's content. Raises InputError when it is of another run. steps: of the run."""
    state = runtime.read_checkpoint(path)
    other = [
        f"--{key.replace('_', '-')} {state['settings'].get(key)}, not {value}"
        for key, value in given.items()
        if state["settings"].get(key) != value
    ]
    if other:
        raise cli.InputError(
            f"checkpoint {path} is of a run with {'; '.join(other)}: resume with its settings, or "
            f"choose another --output"
        )
    if state["corpus"] != corpus:
        raise cli.InputError(
            f"checkpoint {path} is of a run on another corpus, or on other labels of it: resume with "
            f"its --data and --limit, or choose another --output"
        )
    if state["step"] > steps:
        raise cli.InputError(
            f"checkpoint {path} is of step {state['step']:,}, and the run has {steps:,}: choose another one"
        )
    return state


def split(utterances, settings):
    """Utterances to train on, and those held out for validation (none without --validation)."""
    if not settings.validation:
        return utterances, []
    chosen, held_out = data.hold_out_speakers(utterances, settings.validation, settings.seed)
    print(
        f"validation: {len(held_out):,} utterances of {len({u.speaker for u in held_out})} speakers held out, "
        f"{len(chosen):,} left to train on"
    )
    return chosen, held_out


def batch_arithmetic(examples, settings):
    """Print and return how many steps there will be, and what becomes of examples that do not fill one.

    Raises InputError when the processes cannot share a step.
    """
    step_size, processes = min(settings.batch_size * settings.accumulation, examples), runtime.processes()
    # Under --shard the processes compute layer by layer together, so they must have equally many micro-batches
    if step_size < processes or (settings.shard and step_size % processes):
        evenly = "evenly (--shard) " if settings.shard else ""
        raise cli.InputError(
            f"a step of {step_size} examples (--batch-size {settings.batch_size} x --accumulation "
            f"{settings.accumulation}) cannot be shared {evenly}by the {processes} processes of "
            f"torchrun --nproc-per-node"
        )
    per_epoch, left = divmod(examples, step_size)
    steps = per_epoch * settings.epochs
    warmup = math.ceil(settings.warmup * steps)
    print(
        f"batches: {settings.batch_size} examples x {settings.accumulation} micro-batches = "
        f"{settings.batch_size * settings.accumulation} a step; {examples:,} examples = {per_epoch} steps an epoch"
    )
    if (settings.micro_batch, processes) != (settings.batch_size, 1):
        print(f"         computed {settings.micro_batch} at a time in each of {processes} processes")
    if left:
        print(f"         the {left} examples over are left out of an epoch, other ones each time: the order is random")
    print(f"         {settings.epochs} epochs = {steps} steps, the first {warmup} of them warmup")
    return {"step_size": step_size, "per_epoch": per_epoch, "steps": steps, "warmup": warmup}


def build_model(settings):
    """The model with what is to be trained; prints what trains."""
    if settings.strategy == "full" and not settings.shard and torch.cuda.is_available():
        models.check_memory(settings.model, settings.revision, torch.cuda.get_device_properties(0).total_memory)
    model = models.load_base(
        settings.model,
        settings.revision,
        settings.dtype,
        settings.attention,
        settings.speech_adapter,
        settings.quantize,
    )
    if settings.strategy != "full":
        lora = models.add_adapter(model, settings.rank, settings.alpha, settings.dropout)
        settings.rank, settings.alpha, settings.dropout = lora.r, lora.lora_alpha, lora.lora_dropout
    counts = models.set_trainable(model, settings.strategy)
    model.keep_audio(settings.audio_cache)
    if settings.compile:
        model.compile_layers()
    if settings.gradient_checkpointing:
        model.core.gradient_checkpointing_enable({"use_reentrant": False})
    for token in model.started_rows:
        print(f"model: {token} starts from the row of {prompts.USER}: its own spare row is next to nothing")
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model: {total:,} parameters on {model.device}, attention {settings.attention}; trained: "
        + ", ".join(f"{group} {count:,}" for group, count in counts.items())
    )
    return model


def make_examples(utterances, model, longest):
    """data.Examples of the utterances. Raises InputError naming those of more than `longest` tokens."""
    examples = data.Examples(utterances, model.tokenizer, model.audio_id)
    if long := [f"{e.utterance.id} ({e.task}) has {len(e):,}" for e in examples if len(e) > longest]:
        named = ", ".join(long[:5]) + (", ..." if len(long) > 5 else "")
        raise cli.InputError(
            f"{len(long)} examples are longer than --max-tokens {longest:,}: {named}; raise it, or "
            f"take them out of the corpus"
        )
    return examples


def record_settings(settings):
    """Print the settings as they will be used, and write them to settings.json."""
    values = plain(settings)
    print("settings: " + " ".join(f"{key}={value}" for key, value in values.items()))
    values["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    values["processes"] = runtime.processes()
    with files.whole(settings.output / "settings.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
    return values


def distribute(model, settings):
    """What the loop calls in the model's place: the model itself, or PyTorch's wrapper for several processes."""
    if settings.shard:
        models.shard(model)
    elif runtime.processes() > 1:
        return DistributedDataParallel(model)
    return model


def resume(state, weights, optimiser):
    """Put a checkpoint back; returns its step."""
    runtime.restore(state, weights, optimiser)
    print(f"resumed after step {state['step']}")
    if len(state["random"]) != runtime.processes():
        print(f"         saved by {len(state['random'])} processes, now {runtime.processes()}: dropout will be another")
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# In the loop


def synchronised(distributed, last):
    """Gradients go between processes once a step, with its last micro-batch.

    Not under --shard: to keep the whole gradient until then, each process would need room for all of it.
    """
    return distributed.no_sync() if isinstance(distributed, DistributedDataParallel) and not last else nullcontext()


def count_tokens(share):
    """Tokens of some micro-batches, without and with padding."""
    return (
        sum(micro_batch.tokens for micro_batch in share),
        sum(micro_batch.input_ids.numel() for micro_batch in share),
    )


@contextmanager
def memory_advice(share, settings):
    """Says what helps when the GPU's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise cli.RunError(
            f"out of memory with micro-batches of {settings.micro_batch}, longest sequence "
            f"{share[0].input_ids.shape[1]} tokens: lower --micro-batch, or add --gradient-checkpointing (the step "
            f"stays the same), and --resume"
        ) from error


def step_not_finite(step, share, losses, loss, gradient_norm):
    """The error of a step whose loss or gradient is not finite; together."""
    suspects = [batch for batch, value in zip(share, losses) if not value.isfinite()]
    named = (set().union(*(batch.utterances for batch in batches)) for batches in (suspects, share))
    suspected, all_of_them = (set().union(*runtime.gather(names)) for names in named)
    names = suspected or all_of_them
    return cli.RunError(
        f"step {step}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}. The step was not applied and the last "
        f"checkpoint is as it was. It comes from one of: {', '.join(sorted(names))}"
    )


def progress(line):
    """The part of a log line that the progress bar shows."""
    return (
        f"loss {line['loss']:.4f} lr {line['learning_rate']:.1e} grad {line['gradient_norm']:.2f} "
        f"{line['supervised_tokens'] / line['seconds']:.0f} supervised, "
        f"{line['tokens_per_second']:.0f} tokens/s"
    )


def estimate(seconds, left):
    """What is said after the first steps about how long the rest will take."""
    rest = timedelta(seconds=round(seconds / ESTIMATE_AFTER * left))
    return (
        f"{ESTIMATE_AFTER} steps took {seconds:.1f} s: about {rest} (h:mm:ss) for the other {left}, without validation"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Validation: choosing an epoch without looking at the test part


@torch.no_grad()
def validate(model, examples, settings):
    """Loss per supervised token and the metrics on held-out speakers; together.

    Under --shard the loss alone: all processes would have to write every answer, and gather each layer for each token.
    """
    # Under --shard the processes have to compute the same, because each layer's weights come from all of them
    rank, processes = (0, 1) if settings.shard else (cli.process_rank(), runtime.processes())
    step_size = settings.batch_size * settings.accumulation
    steps = [range(start, min(start + step_size, len(examples))) for start in range(0, len(examples), step_size)]
    loss, supervised, pairs = 0.0, 0, {task: [] for task in prompts.TASKS}
    model.eval()
    with runtime.autocast(), torch.compiler.set_stance("force_eager"):  # compiled layers are for the training step
        with loader.load_steps(
            examples, steps, settings.micro_batch, model.prepare, settings.workers, rank, processes
        ) as prepared:
            for count, share in prepared:
                supervised += count
                loss += sum(float(model(micro_batch)) for micro_batch in share)
        share = [] if settings.shard else examples.utterances[rank::processes]
        for start in range(0, len(share), settings.micro_batch):
            batch = share[start : start + settings.micro_batch]
            audio = model.audio_embeddings(batch)
            for task in prompts.TASKS:
                texts = model.generate(batch, audio, task, data.MAX_NEW_TOKENS)
                for utterance, (text, *_) in zip(batch, texts, strict=True):
                    pairs[task].append((prompts.parse_output(task, text), data.reference(utterance, task)))
    model.train()
    if settings.shard:
        return {"loss": loss / supervised}
    (loss,) = runtime.total(loss)
    parts = runtime.gather(pairs)
    pairs = {task: sum((part[task] for part in parts), []) for task in prompts.TASKS}
    numbers, _ = metrics.summarise(pairs["APA"], pairs["MDD"])
    return {"loss": loss / supervised} | {key: None if math.isnan(value) else value for key, value in numbers.items()}


def best_epoch(validated):
    """The epoch with the lowest validation loss (our choice: it is what training lowers)."""
    return min(validated, key=lambda epoch: validated[epoch]["loss"])


def record_validated(output, validated):
    """Print the newest validation result and write them all to validation.jsonl, the best one marked."""
    best, (epoch, numbers) = best_epoch(validated), list(validated.items())[-1]
    shown = [f"{name} {numbers[key]:.3f}" for name, key in VALIDATION_SHOWN.items() if numbers.get(key) is not None]
    verdict = "the best so far" if epoch == best else f"epoch {best} is the best so far"
    tqdm.write(f"epoch {epoch} on held-out speakers: {' '.join(shown)}; {verdict}")
    lines = [{"epoch": epoch, "best": epoch == best, **numbers} for epoch, numbers in validated.items()]
    with files.whole(output / "validation.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_validated(output, step):
    """Validation results up to the step that a run goes on from, as {epoch: numbers}; together."""
    path = output / "validation.jsonl"
    lines = files.read_lines(path, runtime.ValidationLine) if path.exists() else []
    validated = {line.epoch: line.model_dump(exclude={"epoch", "best"}) for line in lines if line.step <= step}
    if len({line.epoch for line in lines}) < len(lines):
        raise cli.InputError(f"{path} has an epoch twice: remove one")
    return runtime.gather(validated)[0]


def main():
    """Train; errors of the user and of the run end with one line and the exit codes 2 and 1."""
    settings = parse_settings()
    runtime.start_processes()
    train(settings)
    runtime.end_processes()


if __name__ == "__main__":
    cli.run_script("train.py", main)
