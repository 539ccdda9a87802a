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
from tqdm import tqdm

import data
import metrics
from support import cli, files
from support.later import when_used

with when_used():  # sign_language does without them
    import peft
    import transformers

    from support import files, pretrained

CHECKPOINT = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]  # what is fetched of one
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


def write_json(path: Path, values: Any) -> None:
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    with files.whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def every(items: Sequence, check: Callable, whose: str) -> list:
    """What `check` returns for each item. Raises one InputError, with a line for every item that it refuses."""
    checked, problems = [], []
    for item in items:
        try:
            checked.append(check(item))
        except cli.InputError as error:
            problems.append(str(error))
    if problems:
        found = f"{len(problems)} of {len(items)} {whose} cannot be used; repair or remove them:"
        raise cli.InputError(found, *problems)
    return checked


# ----------------------------------------------------------------------------------------------------------------------
# Models


def find(name: str | Path) -> Path:
    """The folder of a checkpoint, of a hub id after a download. Raises InputError where it is none that can be read."""
    folder, _ = files.fetch(name, "main", "model", CHECKPOINT)
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):  # a FIFO would be waited for
            raise cli.InputError(f"{path} is not a regular file: give a whole checkpoint")
    return folder


def load(kind: type, folder: Path, dtype: torch.dtype, quantize: bool, skipped=None, may_be_missing=(), **options):
    """A network of one of transformers' classes in a folder; safetensors alone, which execute nothing.

    quantize: in 4 bits, but for the modules skipped. Raises InputError where it cannot be loaded, lacks weights, which
    would be random, or has weights that are no numbers.
    """
    if quantize:
        cli.need("bitsandbytes")
        sizes = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        bits = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped, **sizes)
        options["quantization_config"] = bits
    with pretrained.loading(folder):
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        network, loaded = kind.from_pretrained(folder, **options)
    missing = sorted(set(loaded["missing_keys"]) - set(may_be_missing))
    if wrong := missing + sorted(map(str, loaded["mismatched_keys"])):
        raise cli.InputError(f"{folder} lacks {len(wrong)} weights, such as {wrong[0]}: give a whole checkpoint")
    check_finite(network, folder)
    return network if quantize else network.to(DEVICE)


def check_finite(network: torch.nn.Module, path: Path) -> None:
    for name, weight in chain(network.named_parameters(), network.named_buffers()):
        if weight.is_floating_point() and not weight.isfinite().all():
            raise cli.InputError(f"{path}: {name} holds values that are not finite: give another checkpoint")


def check_ids(ids: Iterable[int], weights: int, path: Path) -> None:
    """Raises InputError where a vocabulary has an id beyond the weights: CTC would read foreign memory."""
    if (largest := max(ids)) >= weights:
        raise cli.InputError(f"{path}: its vocabulary has the id {largest:,}, its weights end with {weights - 1:,}")


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


def train(network, items: list, step_size: int, parts_of: Callable, settings: Any, seed: int, path: Path) -> int:
    """Train on all items for --epochs, each step `step_size` of them, in an order by seed and epoch; AdamW.

    parts_of: the items of a step -> what `update` takes. Writes a line of the log `path` a step. Returns the steps.
    """
    weights = trained(network).values()
    count, total = (sum(weight.numel() for weight in some) for some in (weights, network.parameters()))
    cli.say(f"training {count:,} of {total:,} weights ({count / total:.2%}), seed {seed}")
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    steps = settings.epochs * len(data.epoch_steps(len(items), step_size, seed, 1))
    warmup = math.ceil(settings.warmup * steps)
    network.train()
    with open(path, "w") as log, tqdm(total=steps, desc=f"training, seed {seed}", unit="step") as bar:
        for epoch in range(1, settings.epochs + 1):
            for indices in data.epoch_steps(len(items), step_size, seed, epoch):
                rate = learning_rate(bar.n, steps, settings.learning_rate, warmup)
                parts = parts_of([items[i] for i in indices])
                line = {"epoch": epoch, **update(optimiser, parts, rate, settings.clip, bar.n + 1)}
                print(json.dumps(line), file=log, flush=True)
                bar.update()
                bar.set_postfix_str(f"loss {line['loss']:.4f}, gradient {line['gradient_norm']:.2f}")
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
