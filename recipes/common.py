"""What the three recipes share: output folders, loading, LoRA, the update and its rate, bootstrap."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
import importlib.metadata
from itertools import chain
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
import torch

import data
import metrics
from support import cli, files
from support.files import write_json
from support.later import when_used

with when_used():  # sign_language trains without them
    import peft

    from support import pretrained

CHECKPOINT = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]  # what is fetched of one
MAY_BE_MISSING = {"wav2vec2.masked_spec_embed"}  # in wav2vec2-base-960h, which then was trained without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it says of CPUs helps nobody
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Settings and results


def refuse_unused(settings: Any, mode: str, *used: str) -> None:
    """Raises InputError for a flag that the user wrote beside the one of a mode, which does not use it."""
    unused = [field.name for field in fields(settings) if field.name not in (mode, *used)]
    if written := " ".join(cli.flag(name) for name in unused if cli.given(name)):
        raise cli.InputError(f"{cli.flag(mode)} does not use {written}: leave it out")


@contextmanager
def new_run(settings: Any, command: str, result: str, writes: Iterable[str], *packages: str) -> Iterator[dict]:
    """Own --output and write settings.json into it, with the versions of packages; yields what that says.

    result: the file that a run ends with. Raises InputError where it is there, or the folder holds what is not ours.
    """
    with files.own(settings.output, command, "settings.json", [result, *writes]):
        if (settings.output / result).exists():
            raise cli.InputError(f"{settings.output / result} is there already: choose another --output, or remove it")
        record = {"written_by": files.signature(command)} | json.loads(json.dumps(asdict(settings), default=str))
        record["versions"] = {name: importlib.metadata.version(name) for name in packages}
        write_json(settings.output / "settings.json", record)
        yield record


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    with files.whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def every(items: Sequence[tuple[str, Any]], check: Callable, whose: str) -> list:
    """What `check` returns for each (name, item). Raises one InputError, with a line for every one that it refuses."""
    checked, problems = [], []
    for name, item in items:
        try:
            checked.append(check(item))
        except cli.InputError as error:
            problems.append(f"{name}: {error}")
    if problems:
        found = f"{len(problems)} of {len(items)} {whose} cannot be used; repair or remove them:"
        raise cli.InputError(found, *problems)
    return checked


# ----------------------------------------------------------------------------------------------------------------------
# Models


def find(name: str | Path) -> Path:
    """The folder of a checkpoint, of a hub id after a download. Raises InputError where it is none that can be read."""
    folder, _ = files.fetch(name, "main", "model", CHECKPOINT)
    files.check_regular(folder)
    return folder


def load(network: type, reader: type, name: str | Path, dtype: torch.dtype, quantize=False, skipped=None, **options):
    """A network and what prepares its input, both of transformers' classes, in one folder or hub id.

    quantize: in 4 bits, but for the modules skipped. Weights come from safetensors, which execute nothing. Raises
    InputError where they cannot be loaded, are missing, which would be random, or are no numbers.
    """
    folder = find(name)
    if quantize:
        options["quantization_config"] = pretrained.nf4(skipped, dtype)
    with pretrained.loading(folder):
        reader = reader.from_pretrained(folder)
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        network, loaded = network.from_pretrained(folder, **options)
    missing = sorted(set(loaded["missing_keys"]) - MAY_BE_MISSING)
    if wrong := missing + sorted(map(str, loaded["mismatched_keys"])):
        raise cli.InputError(f"{folder} lacks {len(wrong)} weights, such as {wrong[0]}: give a whole checkpoint")
    check_finite(network, folder)
    return network if quantize else network.to(DEVICE), reader


def check_finite(network: torch.nn.Module, path: Path) -> None:
    for name, weight in chain(network.named_parameters(), network.named_buffers()):
        if weight.is_floating_point() and not weight.isfinite().all():
            raise cli.InputError(f"{path}: {name} holds values that are not finite: give another checkpoint")


def check_ids(ids: Iterable[int], weights: int, path: str | Path) -> None:
    """Raises InputError where a vocabulary has an id beyond the weights: CTC would read foreign memory."""
    if (largest := max(ids)) >= weights:
        raise cli.InputError(f"{path}: its vocabulary has the id {largest:,}, its weights end with {weights - 1:,}")


def frames_needed(target: Sequence) -> int:
    """Frames that CTC needs for the symbols of a target: one each, and a blank between two equal ones."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def add_lora(network, settings: Any, targets: str, **options):
    """The network with a fresh adapter by --rank, --alpha and --dropout, its base frozen. targets: of module names."""
    sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    return peft.get_peft_model(network, peft.LoraConfig(target_modules=targets, **sizes, **options))


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def save(network, folder: Path, processor=None) -> None:
    """A checkpoint, or an adapter in PEFT's format, whole or not at all."""
    # The adapters have no embeddings, so no look at the hub
    options = {"save_embedding_layers": False} if isinstance(network, peft.PeftModel) else {}
    with files.whole(folder) as temporary:
        network.save_pretrained(temporary, **options)
        if processor:
            processor.save_pretrained(temporary)


def autocast():
    """bfloat16 arithmetic on CUDA; plain float32 on a CPU, where it would be slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available())


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Rate of a step (counted from 0): linear over the warmup steps up to the peak, then a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def update(optimiser: torch.optim.Optimizer, parts: Iterable, rate: float, clip: float, step: int) -> dict:
    """One update of the weights. parts: yields (ids, loss), whose sum is the loss of the step; returns what is logged.

    Raises RunError, before the weights change, where loss or gradient is not finite: it would spoil every weight.
    """
    everyone, suspects, total = [], [], 0.0
    for ids, loss in parts:
        loss.backward()
        total += loss.item()
        everyone += ids
        suspects += [] if math.isfinite(loss.item()) else ids
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(weights, clip))
    if not math.isfinite(total + norm):
        raise cli.RunError(
            f"step {step}: loss {total:.4g}, gradient norm {norm:.4g}; the step was not applied. It comes from "
            f"one of: {', '.join(suspects or everyone)}; lower --learning-rate, or leave them out"
        )
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    return {"step": step, "learning_rate": rate, "loss": total, "gradient_norm": norm}


def train(network, optimiser, steps_of: Callable, per_epoch: int, warmup: int, settings: Any, folder: Path) -> Iterator:
    """Train for --epochs, and yield the number of each that is done; log.jsonl in the folder gets a line a step.

    steps_of: an epoch -> for each of its steps what `update` takes; per_epoch: so many; warmup: in steps.
    """
    steps = settings.epochs * per_epoch
    with open(folder / "log.jsonl", "w") as log, cli.Progress(total=steps, desc="training", unit="step") as bar:
        for epoch in range(1, settings.epochs + 1):
            network.train()
            for parts in steps_of(epoch):
                rate = learning_rate(bar.n, steps, settings.learning_rate, warmup)
                line = {"epoch": epoch, **update(optimiser, parts, rate, settings.clip, bar.n + 1)}
                print(json.dumps(line), file=log, flush=True)
                bar.update()
                bar.set_postfix_str(f"loss {line['loss']:.4f}, gradient {line['gradient_norm']:.2f}")
            yield epoch


def fine_tune(network, items: list, step_size: int, parts_of: Callable, settings: Any, seed: int, folder: Path) -> int:
    """Train what is not frozen, each step on `step_size` items in an order by seed and epoch. Returns the steps.

    parts_of: the items of a step -> what `update` takes.
    """
    weights = trained(network).values()
    count, total = (sum(weight.numel() for weight in some) for some in (weights, network.parameters()))
    cli.say(f"training {count:,} of {total:,} weights ({count / total:.2%}), seed {seed}")

    def steps_of(epoch):
        for indices in data.epoch_steps(len(items), step_size, seed, epoch):
            yield parts_of([items[i] for i in indices])

    optimiser = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    per_epoch = len(data.epoch_steps(len(items), step_size, seed, 1))
    steps = settings.epochs * per_epoch
    for _ in train(network, optimiser, steps_of, per_epoch, math.ceil(settings.warmup * steps), settings, folder):
        pass
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def resampled_ratio(numerator: np.ndarray, denominator: np.ndarray, speakers: list[str], seed: int = 0) -> np.ndarray:
    """sum(numerator) / sum(denominator), both (N,), for resampled speakers, (RESAMPLES,); nan for x / 0."""
    rows = np.column_stack([numerator, denominator])

    def numbers_of(drawn: np.ndarray) -> dict[str, float]:
        return {"ratio": metrics.ratio(*drawn.sum(axis=0))}

    return metrics.bootstrap(numbers_of, rows, speakers, speakers, seed)["ratio"]


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share, for items that are independent."""
    low, high = stats.binomtest(count, total).proportion_ci(metrics.LEVEL, "wilson")
    return float(low), float(high)
