"""Fine-tune Phi-4-multimodal on speechocean762 (paper 3.2, 4.2), with a plain PyTorch loop.

    python train.py --rank 64 --epochs 3                              # the paper's run: fetches model and corpus
    python train.py --rank 64 --epochs 3 --resume                     # the same, after it was stopped
    torchrun --nproc-per-node 4 train.py --rank 64 --epochs 3         # the same on four GPUs
    python train.py --rank 64 --epochs 1 --limit 10 --output check    # ten utterances, before a long run
    python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --learning-rate 3e-3   # on a laptop

Writes into --output: settings.json, log.jsonl (one line a step), an adapter per epoch, checkpoints/ for --resume and
curves.png. Then: evaluate.py.
"""

from dataclasses import asdict, dataclass
import importlib.metadata
import math
import os
from pathlib import Path
import random
import shutil
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data import (
    HUB_CORPUS,
    HUB_CORPUS_REVISION,
    MAX_NEW_TOKENS,
    Examples,
    describe,
    epoch_steps,
    find_corpus,
    fingerprint,
    hold_out_speakers,
    read_corpus,
)
import metrics
import prompts
from support import choices, cli, files, screen
from support.later import when_used

with when_used():
    import torch

    import model as models
    from support import checkpoints, memory, moved, pretrained, processes, sharding, workers
    from support import run as runs


@dataclass
class Settings:
    """Every setting of a run, with its unit and source; --help prints them, settings.json keeps them."""

    # Data (paper 4.1)
    data: str = HUB_CORPUS  # corpus folder in the release's layout, or hub id
    data_revision: str = HUB_CORPUS_REVISION  # of the hub id; the labels changed in April 2026
    limit: cli.Count | None = None  # use only the first N utterances
    validation: cli.Fraction = 0.0  # share of the training speakers held out, to choose an epoch by
    max_tokens: cli.Count = 2048  # an example longer than this is an error, never cut

    # Model (paper 3.2)
    model: str = choices.HUB_MODEL  # checkpoint folder or hub id
    revision: str | None = choices.HUB_MODEL_REVISION  # of the hub id: transformers' own format
    strategy: choices.Strategy = "lora"  # what trains: LoRA; encoder and projector as well; all weights, without LoRA
    speech_adapter: choices.SpeechAdapter = "merge"  # shipped: folded in, trained on (the paper's words), or none
    rank: choices.Rank | None = 64  # of the fresh LoRA (not in the paper; our choice)
    alpha: cli.Count | None = 128  # of the fresh LoRA, scale alpha / rank (our choice)
    dropout: cli.Fraction | None = 0.05  # of the fresh LoRA's input (our choice)
    quantize: choices.Quantize | None = None  # QLoRA: keep the language model's frozen layers in 4 bits
    dtype: choices.Dtype | None = None  # of frozen weights (trained ones: float32); not given: bfloat16 on CUDA
    attention: choices.Attention = "sdpa"  # implementation

    # Optimisation (paper 4.2)
    epochs: cli.Count = 3  # passes over the corpus (Table 3 reports 1-4, 3 is best)
    batch_size: cli.Count = 8  # examples in a micro-batch (paper 4.2)
    accumulation: cli.Count = 8  # micro-batches in a step (paper 4.2)
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-5  # peak (paper 4.2)
    warmup: cli.Fraction = 0.03  # fraction of all steps with linear warmup (our choice)
    weight_decay: cli.Fraction = 0.0  # AdamW's; 0 makes it the paper's Adam (paper 4.2)
    betas: tuple[cli.Fraction, cli.Fraction] = (0.9, 0.999)  # of AdamW (PyTorch's; not in the paper)
    epsilon: cli.Positive = 1e-8  # of AdamW (PyTorch's; not in the paper)
    clip: cli.Positive = 1.0  # largest norm of a step's gradient (our choice)
    patience: cli.Count | None = None  # stop after this many epochs without a lower validation loss

    # Memory: what a step computes stays the same
    micro_batch: cli.Count | None = None  # examples computed at once on a device; not given: --batch-size
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    compile: bool = False  # torch.compile: faster and smaller after a minute or two, last digits differ
    shard: bool = False  # under torchrun: each process holds a part of the weights (FSDP2); validates by loss alone

    # Run
    seed: cli.Seed = 0  # of weights, order, dropout and held-out speakers (our choice)
    output: Path = Path("out")  # folder for adapters, settings and log
    audio_cache: Path = Path("audio-cache")  # folder for audio embeddings; runs share it, and it may be removed
    workers: choices.Workers | None = None  # that prepare steps; not given: 2 beside a GPU, else 0
    save_minutes: cli.Positive = 30.0  # time between checkpoints within an epoch
    resume: bool = False  # go on with the run in --output, from its newest checkpoint
    checkpoint: Path | None = None  # with --resume: go on from this one
    track: Literal["tensorboard", "wandb"] | None = None  # show the log there as well


# What may differ when a run is resumed. The corpus has to be the same, but may lie elsewhere.
MAY_CHANGE = {"output", "resume", "checkpoint", "save_minutes", "micro_batch", "gradient_checkpointing", "max_tokens"}
MAY_CHANGE |= {"patience", "track", "data", "data_revision", "audio_cache", "workers", "compile"}
SHOWN = {"loss": "loss"} | {name: f"{name}_pcc" for name in prompts.SCORES} | {"WER": "wer", "PER": "per"}


def check(settings):
    """Raises InputError for settings that cannot work together, and for what is not installed."""
    s, full, nf4 = settings, settings.strategy == "full", settings.quantize == "nf4"
    lora = " ".join(f"--{name}" for name in ("rank", "alpha", "dropout") if cli.given(name))
    if full and lora:
        raise cli.InputError(f"--strategy full trains no LoRA: leave out {lora}")
    if full and s.speech_adapter == "continue":
        raise cli.InputError("--strategy full trains no LoRA, so none for --speech-adapter continue: use merge or none")
    if s.speech_adapter == "continue" and lora:
        raise cli.InputError(f"--speech-adapter continue trains the shipped adapter as it is: leave out {lora}")
    if nf4 and s.strategy != "lora":  # 4 bits hold no small step, and an encoder would learn their rounding
        raise cli.InputError(f"--quantize nf4 does not go with --strategy {s.strategy}: use --strategy lora")
    if s.shard and not full:
        raise cli.InputError(f"--shard is for --strategy full: each GPU has room for what {s.strategy} trains")
    if s.shard and "RANK" not in os.environ:
        raise cli.InputError("--shard needs several processes: start it with torchrun --nproc-per-node N")
    if s.micro_batch and s.micro_batch > s.batch_size * s.accumulation:
        raise cli.InputError(
            f"--micro-batch {s.micro_batch} is more than a step has: --batch-size {s.batch_size} x --accumulation "
            f"{s.accumulation}"
        )
    for name, source in (("data_revision", s.data), ("revision", s.model)):
        if cli.given(name) and Path(source).is_dir():
            raise cli.InputError(f"{cli.flag(name)} {getattr(s, name)} is of a hub id, and {source} is a folder")
    if s.patience and not s.validation:
        raise cli.InputError(f"--patience {s.patience} needs held-out speakers: add --validation 0.1")
    if s.checkpoint and not s.resume:
        raise cli.InputError(f"--checkpoint {s.checkpoint} is where to go on from: add --resume")
    flash = s.attention == "flash_attention_2"
    if flash and (s.dtype or models.default_dtype()) == "float32":
        raise cli.InputError(
            "--attention flash_attention_2 works in 16 bits, not with --dtype float32 (a CPU's default)"
        )
    if s.compile and not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise cli.InputError("--compile needs a C++ compiler where there is no GPU, and finds none: install g++")
    track = "wandb" if s.track == "wandb" else "tensorboard"
    for needed, package in ((s.track, track), (nf4, "bitsandbytes"), (flash, "flash_attn")):
        if needed:
            cli.need(package)


def resolve(settings):
    """Put in what stands for "not given", and take out what the strategy does not use."""
    settings.dtype = settings.dtype or models.default_dtype()
    settings.micro_batch = settings.micro_batch or settings.batch_size
    if settings.workers is None:
        settings.workers = 2 if torch.cuda.is_available() else 0
    if settings.strategy == "full" or settings.speech_adapter == "continue":
        settings.rank = settings.alpha = settings.dropout = None


def plain(settings):
    """Settings as JSON has them."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return values | {"betas": list(settings.betas)}


# ----------------------------------------------------------------------------------------------------------------------
# Method (paper 4.2)


def learning_rate(step, steps, peak, warmup):
    """Rate of a step (counted from 0): linear over the warmup steps up to the peak, then a cosine down to 0.

    The first step has peak / warmup, not 0, and the step after the last one would have 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def autocast():
    """bfloat16 arithmetic on CUDA; plain float32 on a CPU, where it would be slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available())


def train_step(model, weights, optimiser, micro_batches, supervised, clip, number):
    """One update of the weights. Returns what is logged of it; collective.

    The gradient is the mean over all supervised tokens of the step, however it is cut into micro-batches and shared by
    processes. model: SpeechModel, or DistributedDataParallel around it; weights: {name: parameter} of what trains;
    micro_batches: this process' list of data.MicroBatch; supervised: tokens of the whole step; number: of the step.
    Raises RunError, before the update, when loss or gradient is not finite: one such value would spoil every weight.
    """
    losses = []
    for micro_batch in micro_batches:  # gradient accumulation
        with sharding.synchronised(model, last=micro_batch is micro_batches[-1]):
            with autocast():
                loss = model(micro_batch) / supervised
            (loss * processes.count()).backward()  # PyTorch averages over processes where a sum is needed
        losses.append(loss.detach())

    tokens = sum(micro_batch.tokens for micro_batch in micro_batches)
    computed = sum(math.prod(micro_batch.input_ids.shape) for micro_batch in micro_batches)
    loss, tokens, computed = processes.total(sum(losses), tokens, computed)
    norm = float(processes.whole_tensor(torch.nn.utils.clip_grad_norm_(weights.values(), clip)))  # before clipping
    if not math.isfinite(loss + norm):
        raise runs.not_finite(number, micro_batches, losses, loss, norm)
    optimiser.step()
    optimiser.zero_grad()
    return {
        "loss": loss,
        "gradient_norm": norm,
        "supervised_tokens": supervised,
        "tokens": int(tokens),
        "padding": 1 - tokens / computed,
    }


def train(settings):
    """One run, from the corpus to the adapters. Raises InputError before anything slow when the input is wrong."""
    checkpoints.choose(settings.output, settings.resume, settings.checkpoint)  # says at once what is wrong there
    # refs/pr/70 moves, a commit does not
    settings.revision = pretrained.check(
        settings.model, settings.revision, settings.speech_adapter, settings.max_tokens + MAX_NEW_TOKENS
    )
    chosen, held_out, corpus = read_data(settings)
    step_size, per_epoch = batch_arithmetic(sum(len(utterance.tasks) for utterance in chosen), settings)
    steps = per_epoch * settings.epochs
    warmup = math.ceil(settings.warmup * steps)
    screen.say(f"{settings.epochs} epochs = {steps} steps, the first {warmup} of them warmup")
    files.make_folder(settings.audio_cache, "--audio-cache")
    identity = {key: value for key, value in plain(settings).items() if key not in MAY_CHANGE}

    with runs.open_run(settings, identity, corpus, per_epoch) as run:
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(settings.seed)
        model = build_model(settings)
        examples, held_out = (make_examples(part, model, settings.max_tokens) for part in (chosen, held_out))
        pretrained.check_hearing(model, chosen)
        # From here on each process has random numbers of its own: dropout differs, the weights do not
        torch.manual_seed(settings.seed + (cli.process_rank() << 32))
        distributed = sharding.distribute(model, model.layers, settings.shard)
        weights = models.trained_parameters(model)
        optimiser = torch.optim.AdamW(
            weights.values(), betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
        )  # fused: one pass over weights, gradients and moments, and no copies
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        record = plain(settings) | {"versions": versions, "processes": processes.count()}
        run.start(weights, optimiser, record)

        model.train()
        for epoch in run.epochs():
            order = run.left(epoch_steps(len(examples), step_size, settings.seed, epoch))
            with workers.load_steps(examples, order, settings.micro_batch, model.prepare, settings.workers) as prepared:
                for supervised, micro_batches in prepared:
                    rate = learning_rate(run.step, steps, settings.learning_rate, warmup)
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                    with memory.advice(micro_batches, settings.micro_batch):
                        numbers = train_step(
                            distributed, weights, optimiser, micro_batches, supervised, settings.clip, run.step + 1
                        )
                    shift = model.moved() if run.at_last_step else {}
                    if shift:
                        run.say(f"epoch {epoch}: {moved.describe(shift)}")
                    run.record({"learning_rate": rate, **numbers, **shift})  # saves when due; ends here when to stop

            models.save_trained(model, settings.output / f"epoch-{epoch}", record | {"epoch": epoch})
            if held_out and epoch not in run.validated:
                run.record_validation(validate(model, held_out, settings), SHOWN)
            if run.out_of_patience():
                break
        run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop


def read_data(settings):
    """Utterances to train on, those held out for validation, and the fingerprint of all; prints what was read."""
    _, settings.data_revision = find_corpus(settings.data, settings.data_revision)
    utterances = read_corpus(settings.data, "train", settings.data_revision, settings.limit)
    screen.say(f"corpus: {describe(utterances)}")
    if not settings.validation:
        return utterances, [], fingerprint(utterances)
    chosen, held_out = hold_out_speakers(utterances, settings.validation, settings.seed)
    speakers = len({utterance.speaker for utterance in held_out})
    screen.say(
        f"validation: {len(held_out):,} utterances of {speakers} speakers held out, {len(chosen):,} left to train on"
    )
    return chosen, held_out, fingerprint(utterances)


def batch_arithmetic(examples, settings):
    """Examples of a step and steps of an epoch; prints them, and what becomes of examples that do not fill a step.

    Raises InputError when the processes cannot share a step.
    """
    asked, count = settings.batch_size * settings.accumulation, processes.count()
    step_size = min(asked, examples)
    sizes = f"--batch-size {settings.batch_size} x --accumulation {settings.accumulation}"
    # Under --shard the processes compute layer by layer together, so they must have equally many micro-batches
    if step_size < count or (settings.shard and step_size % count):
        raise cli.InputError(
            f"a step of {step_size} examples ({sizes}) cannot be shared {'evenly ' * settings.shard}by the {count} "
            f"processes of torchrun --nproc-per-node"
        )
    per_epoch, left = divmod(examples, step_size)
    screen.say(
        f"batches: {settings.batch_size} examples x {settings.accumulation} micro-batches = {asked} a step; "
        f"{examples:,} examples = {per_epoch} steps an epoch"
    )
    if (settings.micro_batch, count) != (settings.batch_size, 1):
        screen.say(f"computed {settings.micro_batch} at a time in each of {count} processes")
    if left:
        screen.say(f"the {left} examples over are left out of an epoch, other ones each time: the order is random")
    return step_size, per_epoch


def build_model(settings):
    """The model with what is to be trained; prints what trains."""
    s = settings
    if s.strategy == "full" and not s.shard and torch.cuda.is_available():
        memory.check_full(s.model, s.revision, [models.PARAMETER_GROUPS[group] for group in models.STRATEGIES["full"]])
    model = models.load_base(s.model, s.revision, s.dtype, s.attention, s.speech_adapter, s.quantize)
    if s.strategy != "full":
        lora = models.add_adapter(model, s.rank, s.alpha, s.dropout)
        s.rank, s.alpha, s.dropout = lora.r, lora.lora_alpha, lora.lora_dropout
    counts = models.set_trainable(model, s.strategy)
    model.keep_audio(s.audio_cache)
    if s.compile:
        model.compile_layers()
    if s.gradient_checkpointing:
        model.core.gradient_checkpointing_enable({"use_reentrant": False})
    screen.say(f"model: {model.spare_rows}")
    for token in model.started_rows:
        screen.say(f"model: {token} starts from the row of {prompts.USER}: its own spare row is next to nothing")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = ", ".join(f"{group} {count:,}" for group, count in counts.items())
    screen.say(f"model: {total:,} parameters on {model.device}, attention {s.attention}; trained: {trained}")
    return model


def make_examples(utterances, model, longest):
    """data.Examples of the utterances. Raises InputError naming those of more than `longest` tokens."""
    examples = Examples(utterances, model.tokenizer, model.audio_id)
    if long := [f"{e.utterance.id} ({e.task}) has {len(e):,}" for e in examples if len(e) > longest]:
        named = ", ".join(long[:5]) + (", ..." if len(long) > 5 else "")
        raise cli.InputError(
            f"{len(long)} examples are longer than --max-tokens {longest:,}: {named}; raise it, or take them out of "
            f"the corpus"
        )
    return examples


# ----------------------------------------------------------------------------------------------------------------------
# Validation: choosing an epoch without looking at the test part


def validate(model, examples, settings):
    """Loss per supervised token and the metrics on held-out speakers; collective.

    Under --shard the loss alone: all processes would have to write every answer, and gather each layer for each token.
    They then compute the same batches, because each layer's weights come from all of them.
    """
    size, loss, supervised, records = settings.batch_size * settings.accumulation, 0.0, 0, []
    steps = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled layers are for the training step
        with workers.load_steps(
            examples, steps, settings.micro_batch, model.prepare, settings.workers, settings.shard
        ) as prepared:
            for tokens, micro_batches in prepared:
                supervised += tokens
                with autocast():
                    loss += sum(float(model(micro_batch)) for micro_batch in micro_batches)
        share = [] if settings.shard else examples.utterances[cli.process_rank() :: processes.count()]
        for start in range(0, len(share), settings.micro_batch):
            records += model.answer(share[start : start + settings.micro_batch])
    model.train()
    if settings.shard:
        return {"loss": loss / supervised}
    (loss,) = processes.total(loss)
    numbers, _ = metrics.score(sum(processes.gather(records), []))
    return {"loss": loss / supervised} | {key: None if math.isnan(value) else value for key, value in numbers.items()}


def main():
    """Train; errors of the user and of the run end with one line and the exit codes 2 and 1."""
    settings = cli.parse(Settings, __doc__)
    check(settings)
    resolve(settings)
    processes.start()
    train(settings)
    processes.end()


if __name__ == "__main__":
    cli.run_script("train.py", main)
