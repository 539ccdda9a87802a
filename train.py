"""Fine-tune Phi-4-multimodal on speechocean762 (paper 3.2, 4.2), with a plain PyTorch loop.

    python train.py --rank 64 --epochs 3                              # the paper's run: fetches model and corpus
    python train.py --resume                                          # goes on with the run in out/
    torchrun --nproc-per-node 4 train.py --rank 64 --epochs 3         # the same on four GPUs
    python train.py --rank 64 --epochs 1 --limit 10 --output check    # ten utterances, before a long run
    python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --learning-rate 3e-3   # on a laptop

Writes into --output: settings.json, log.jsonl (one line a step), an adapter per epoch, checkpoints/ for --resume and
curves.png. Then: evaluate.py.
"""

from dataclasses import asdict, dataclass, fields, replace
import importlib.metadata
import math
from pathlib import Path
import random
import shutil
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

import data
from data import HUB_CORPUS, HUB_CORPUS_REVISION
import prompts
from support import cli, files
from support import run as runs
from support.later import when_used

with when_used():
    import torch

    import model as models
    from support import pretrained, processes


@dataclass
class Method:
    """What a run computes, each setting with its unit and source; --resume reads it from the run's settings.json."""

    # The paper's (3.2, 4.2)
    strategy: runs.Strategy = "lora"  # what trains: LoRA; or audio encoder and projector as well
    epochs: cli.Count = 3  # passes over the corpus (Table 3 reports 1-4, 3 is best)
    batch_size: cli.Count = 8  # examples in a micro-batch
    accumulation: cli.Count = 8  # micro-batches in a step
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-5  # peak
    weight_decay: cli.Fraction = 0.0  # AdamW's; 0 makes it the paper's Adam

    # Ours: not stated in the paper
    rank: runs.Rank | None = 64  # of the fresh LoRA
    alpha: cli.Count | None = 128  # of the fresh LoRA, scale alpha / rank
    dropout: cli.Fraction | None = 0.05  # of the fresh LoRA's input
    speech_adapter: runs.SpeechAdapter = "merge"  # shipped: folded in, trained on (the paper's words), or none
    warmup: cli.Fraction = 0.03  # fraction of all steps with linear warmup
    clip: cli.Positive = 1.0  # largest norm of a step's gradient
    betas: tuple[cli.Fraction, cli.Fraction] = (0.9, 0.999)  # of AdamW (PyTorch's)
    epsilon: cli.Positive = 1e-8  # of AdamW (PyTorch's)
    seed: cli.Seed = 0  # of weights, order, dropout and held-out speakers
    model: str = runs.HUB_MODEL  # checkpoint folder or hub id
    revision: str | None = runs.HUB_MODEL_REVISION  # of the hub id: transformers' own format
    dtype: runs.Dtype | None = None  # of frozen weights (trained ones: float32); not given: bfloat16 on CUDA
    quantize: runs.Quantize | None = None  # QLoRA: keep the language model's frozen layers in 4 bits
    attention: runs.Attention = "sdpa"  # implementation
    limit: cli.Count | None = None  # use only the first N utterances
    validation: cli.Fraction = 0.0  # share of the training speakers held out, to choose an epoch by


@dataclass
class Settings(Method):
    # The run's: where, how fast, how it is shown. With --resume they may change
    data: str = HUB_CORPUS  # corpus folder in the release's layout, or hub id
    data_revision: str | None = HUB_CORPUS_REVISION  # of the hub id; the labels changed in April 2026
    data_reader: Path | None = None  # Python file that reads another layout: docs/own-data.md
    max_tokens: cli.Count = 2048  # an example longer than this is an error, never cut
    micro_batch: cli.Count | None = None  # examples computed at once on a device; not given: --batch-size
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    compile: bool = False  # torch.compile: faster and smaller after a minute or two, last digits differ
    patience: cli.Count | None = None  # stop after this many epochs without a lower validation loss
    output: Path = Path("out")  # folder for adapters, settings and log
    save_minutes: cli.Positive = 30.0  # time between checkpoints within an epoch
    resume: bool = False  # go on with the run in --output, from its newest checkpoint
    track: Literal["tensorboard", "wandb"] | None = None  # show the log there as well


def resumed(settings: Settings) -> Settings:
    """The settings of the run in --output, with those of this command line that are no part of the method.

    Raises InputError when another method is given than that of the run.
    """
    path = settings.output / runs.MARK
    if not settings.resume:
        return settings
    if not path.exists():
        cli.say(f"no run in {settings.output}: it begins at the start")
        return settings
    saved = files.read_json(path, Settings)
    if files.read_json(path, dict).get("prompts") != prompts.digest():
        raise cli.InputError(f"the run in {settings.output} was begun with other prompts: choose another --output")
    for name in (field.name for field in fields(Method) if cli.given(field.name)):
        given, was = getattr(settings, name), getattr(saved, name)
        if given != was:
            raise cli.InputError(f"{cli.flag(name)} {given}: the run in {settings.output} has {was}; leave it out")
    data.reader_again(settings.data_reader, saved.data_reader)
    ours = {field.name for field in fields(Settings)} - {field.name for field in fields(Method)}
    given = {name: getattr(settings, name) for name in ours if cli.given(name)}
    return replace(saved, **given | {"resume": True, "output": settings.output})


def check(settings: Settings) -> None:
    """Raises InputError for settings that cannot work together, and for what is not installed."""
    s = settings
    if s.speech_adapter == "continue" and (lora := [cli.flag(n) for n in ("rank", "alpha", "dropout") if cli.given(n)]):
        raise cli.InputError(f"--speech-adapter continue trains the shipped adapter as it is: leave out {lora[0]}")
    for name, source in (("data_revision", s.data), ("revision", s.model)):
        if cli.given(name) and Path(source).is_dir():
            raise cli.InputError(f"{cli.flag(name)} {getattr(s, name)} is of a hub id, and {source} is a folder")
    if s.patience and not s.validation:
        raise cli.InputError(f"--patience {s.patience} needs held-out speakers: add --validation 0.1")
    flash = "flash_attn" if s.attention == "flash_attention_2" else None
    if flash and (s.dtype or models.default_dtype()) == "float32":
        raise cli.InputError(
            "--attention flash_attention_2 works in 16 bits, not with --dtype float32 (a CPU's default)"
        )
    if s.compile and not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise cli.InputError("--compile needs a C++ compiler where there is no GPU, and finds none: install g++")
    for package in filter(None, (s.track, s.quantize and "bitsandbytes", flash)):
        cli.need(package)


def resolve(settings: Settings) -> None:
    """Put in what stands for "not given", and take out what the shipped adapter brings along."""
    settings.dtype = settings.dtype or models.default_dtype()
    settings.micro_batch = settings.micro_batch or settings.batch_size
    if settings.speech_adapter == "continue":
        settings.rank = settings.alpha = settings.dropout = None


# ----------------------------------------------------------------------------------------------------------------------
# Method (paper 4.2)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Rate of a step (counted from 0): linear over the warmup steps up to the peak, then a cosine down to 0.

    The first step has peak / warmup, not 0, and the step after the last one would have 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def autocast() -> "torch.autocast":
    """bfloat16 arithmetic on CUDA; plain float32 on a CPU, where it would be slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available())


def train_step(
    model: "models.SpeechModel",
    weights: runs.Weights,
    optimiser: "torch.optim.Optimizer",
    step: list[data.Example],
    size: int,
    clip: float,
) -> dict[str, float]:
    """One update of the weights. Returns what is logged of it; collective.

    The gradient is the mean over all supervised tokens of the step, however it is cut into micro-batches and shared by
    processes. weights: {name: parameter} of what trains; size: most examples of a micro-batch; clip: largest norm.
    Raises RunError, before the update, when loss or gradient is not finite: one such value would spoil every weight.
    """
    supervised = sum(len(example.answer_ids) for example in step)
    parts, tokens, computed = [], 0, 0
    for examples in data.micro_batches(step, size, cli.process_rank(), processes.count()):  # gradient accumulation
        batch = data.collate(examples, model.pad_id)
        try:
            with autocast():
                loss = model.loss(batch, model.hear(batch.utterances)) / supervised
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise cli.RunError(
                f"out of memory with micro-batches of {size}, longest {batch.input_ids.shape[1]} tokens: lower "
                f"--micro-batch, or add --gradient-checkpointing (the step stays the same), and --resume"
            ) from error
        parts.append((loss.detach(), [example.utterance.id for example in examples]))
        tokens, computed = tokens + batch.tokens, computed + batch.input_ids.size
    processes.sum_gradients(weights.values())
    loss, tokens, computed = processes.total(sum(loss for loss, _ in parts), tokens, computed)
    norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), clip))  # before clipping
    if not math.isfinite(loss + norm):
        suspects = [ids for part, ids in parts if not part.isfinite()] or [ids for _, ids in parts]
        named = sorted({id for ids in sum(processes.gather(suspects), []) for id in ids})
        raise cli.RunError(
            f"loss {loss:.4g}, gradient norm {norm:.4g}: the step was not applied, the last checkpoint is as it was. "
            f"It comes from one of: {', '.join(named)}"
        )
    optimiser.step()
    optimiser.zero_grad()
    return {
        "loss": loss,
        "gradient_norm": norm,
        "supervised_tokens": supervised,
        "tokens": int(tokens),
        "padding": 1 - tokens / computed,
    }


def train(settings: Settings) -> None:
    """One run, from the corpus to the adapters. Raises InputError before anything slow when the input is wrong."""
    # refs/pr/70 moves, a commit does not
    checkpoint = pretrained.find(settings.model, settings.revision, settings.max_tokens + data.MAX_NEW_TOKENS)
    settings.revision = checkpoint.commit
    chosen, held_out, corpus = read_data(settings)
    step_size, per_epoch = batch_arithmetic(sum(len(utterance.tasks) for utterance in chosen), settings)
    steps = per_epoch * settings.epochs
    warmup = math.ceil(settings.warmup * steps)
    cli.say(f"{settings.epochs} epochs = {steps} steps, the first {warmup} of them warmup")

    record = as_json(settings)
    with runs.open_run(settings, record, corpus, per_epoch) as run:
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(settings.seed)
        model = build_model(settings, checkpoint)
        examples, held_out = (
            data.make_examples(part, model.tokenizer, model.audio_id, settings.max_tokens)
            for part in (chosen, held_out)
        )
        pretrained.check_hearing(model, models.generate, chosen)
        # From here on each process has random numbers of its own: dropout differs, the weights do not
        torch.manual_seed(settings.seed + (cli.process_rank() << 32))
        weights = models.trained_parameters(model)
        optimiser = torch.optim.AdamW(
            weights.values(), betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
        )  # fused: one pass over weights, gradients and moments, and no copies
        run.start(weights, optimiser, record)

        model.train()
        for epoch in run.epochs():
            for step in run.left(data.epoch_steps(len(examples), step_size, settings.seed, epoch)):
                rate = learning_rate(run.step, steps, settings.learning_rate, warmup)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                own = [examples[index] for index in step]
                numbers = train_step(model, weights, optimiser, own, settings.micro_batch, settings.clip)
                run.record({"learning_rate": rate, **numbers})  # saves when due; ends here when to stop

            run.say(f"epoch {epoch}: {models.describe_moved(model)}")
            if held_out:
                run.record_validation(validate(model, held_out, settings.micro_batch))
            saved = record | {"epoch": epoch, "validation_loss": run.losses.get(epoch)}
            models.save_trained(model, settings.output / f"epoch-{epoch}", saved)
        run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Around the loop


def as_json(settings: Settings) -> dict[str, Any]:
    """What settings.json keeps: the settings as they are used, the prompts' digest, and versions."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return values | {"prompts": prompts.digest(), "versions": versions, "processes": processes.count()}


def read_data(settings: Settings) -> tuple[list[data.Utterance], list[data.Utterance], str]:
    """Utterances to train on, those held out for validation, and the fingerprint of all; prints what was read."""
    folder, settings.data_revision = data.find_corpus(settings.data, settings.data_revision)
    utterances = data.read_corpus(folder, "train", settings.limit, settings.data_reader)
    cli.say(f"corpus: {data.describe(utterances)}")
    if not settings.validation:
        return utterances, [], data.fingerprint(utterances)
    chosen, held_out = data.hold_out_speakers(utterances, settings.validation, settings.seed)
    speakers = len({utterance.speaker for utterance in held_out})
    cli.say(
        f"validation: {len(held_out):,} utterances of {speakers} speakers held out, {len(chosen):,} left to train on"
    )
    return chosen, held_out, data.fingerprint(utterances)


def batch_arithmetic(examples: int, settings: Settings) -> tuple[int, int]:
    """Examples of a step and steps of an epoch; prints them, and what becomes of examples that do not fill a step.

    Raises InputError when there are more processes than examples in a step.
    """
    asked, count = settings.batch_size * settings.accumulation, processes.count()
    step_size = min(asked, examples)
    if step_size < count:
        raise cli.InputError(
            f"a step of {step_size} examples (--batch-size {settings.batch_size} x --accumulation "
            f"{settings.accumulation}) cannot be shared by the {count} processes of torchrun --nproc-per-node"
        )
    per_epoch, left = divmod(examples, step_size)
    cli.say(
        f"batches: {settings.batch_size} examples x {settings.accumulation} micro-batches = {asked} a step; "
        f"{examples:,} examples = {per_epoch} steps an epoch"
    )
    if (settings.micro_batch, count) != (settings.batch_size, 1):
        cli.say(f"computed {settings.micro_batch} at a time in each of {count} processes")
    if left:
        cli.say(f"the {left} examples over are left out of an epoch, other ones each time: the order is random")
    return step_size, per_epoch


def build_model(settings: Settings, checkpoint: "pretrained.Checkpoint") -> "models.SpeechModel":
    """The model with what is to be trained; prints what trains."""
    s = settings
    model = models.load_base(checkpoint, s.dtype, s.attention, s.speech_adapter, s.quantize)
    models.add_adapter(model, s.rank, s.alpha, s.dropout)
    counts = models.set_trainable(model, s.strategy)
    model.keep_audio = True
    if s.compile:
        for layer in model.core.model.layers:
            layer.compile(dynamic=True)  # for micro-batches of any length
    if s.gradient_checkpointing:
        model.core.gradient_checkpointing_enable({"use_reentrant": False})
    cli.say(f"model: {models.control_start(model)[1]}")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = ", ".join(f"{group} {count:,}" for group, count in counts.items())
    cli.say(f"model: {total:,} parameters on {model.device}, attention {s.attention}; trained: {trained}")
    return model


def validate(model: "models.SpeechModel", examples: list[data.Example], size: int) -> float:
    """Loss per supervised token on held-out speakers, to choose an epoch by without the test part; collective."""
    loss = supervised = 0
    model.eval()
    with torch.no_grad(), autocast(), torch.compiler.set_stance("force_eager"):  # compiled: for the training step
        for own in data.micro_batches(examples, size, cli.process_rank(), processes.count()):
            batch = data.collate(own, model.pad_id)
            loss += float(model.loss(batch, model.hear(batch.utterances)))
            supervised += int((batch.labels != data.IGNORE).sum())
    model.train()
    loss, supervised = processes.total(loss, supervised)
    return loss / supervised


def main() -> None:
    """Train; errors of the user and of the run end with one line and the exit codes 2 and 1."""
    settings = resumed(cli.parse(Settings, __doc__))
    check(settings)
    resolve(settings)
    processes.start()
    train(settings)
    processes.end()


if __name__ == "__main__":
    cli.run_script("train.py", main)
