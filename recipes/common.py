"""What the three recipes share: settings, files of results, loading, LoRA, the small training loop, bootstrap.

Adapters, quantisation and transformers are imported where they are used: sign_language.py does without.
"""

from contextlib import contextmanager
from dataclasses import asdict, fields
import importlib.metadata
import json
import logging
import math
from pathlib import Path
import resource
import sys
import time
import warnings

import numpy as np
from scipy import stats
import torch
from tqdm import tqdm

import data
import metrics
from support import cli, files

HUB = "checkpoint in safetensors, as a folder, or as a hub id that can be reached"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Settings and results


def written(names):
    """Those of the settings that the user wrote, as flags: "--rank --alpha"; empty where there are none."""
    return " ".join(cli.flag(name) for name in names if cli.given(name))


def written_beside(settings, *names):
    """All flags that the user wrote but these."""
    return written(field.name for field in fields(settings) if field.name not in names)


def new_output(folder, made_by_a_run):
    """Make a folder for all that a run writes. Raises InputError where it holds a run already."""
    if (folder / made_by_a_run).exists():
        raise cli.InputError(f"{folder / made_by_a_run} exists already: choose another --output, or remove it")
    files.make_folder(folder, "--output")


def record(settings):
    """The settings as plain values, for a file."""
    return {name: json.loads(json.dumps(value, default=str)) for name, value in asdict(settings).items()}


def versions(*packages):
    return {"versions": {name: importlib.metadata.version(name) for name in packages}}


def write_json(path, values):
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_lines(path, lines):
    with files.whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def every(items, check, whose):
    """What `check` returns for each item. Raises one InputError, with a line for every item that it refuses."""
    checked, problems = [], []
    for item in items:
        try:
            checked.append(check(item))
        except cli.InputError as error:
            problems.append(str(error))
    if problems:
        found = f"{len(problems)} of {len(items)} {whose} cannot be used; repair or remove them:"
        raise cli.InputError("\n  ".join([found, *problems]))
    return checked


# ----------------------------------------------------------------------------------------------------------------------
# Models


def quieten():
    """Silence what libraries say while they load: no user can act on it, and missing weights are checked for here."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def loading(flag, name, kind):
    """Turns a library's failure to load the file, folder or hub id `name` into an InputError that asks for a `kind`."""
    remedy = f"{flag} needs {kind}"
    if not Path(name).exists() and len(Path(name).parts) > 1 and Path(name).parent.is_dir():
        # Not a hub id, which would be asked for again and again where there is no network
        raise cli.InputError(f"{flag} {name} does not exist: {remedy}")
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:  # four libraries read a checkpoint, and each has its own for a broken one
        raise cli.InputError(f"{flag} {name} cannot be loaded: {cli.first_line(error)}; {remedy}") from error


def check_weights(loaded, name, may_be_missing=()):
    """Raises InputError where a checkpoint lacks weights: they would be random. loaded: transformers' loading info."""
    missing = sorted(set(loaded["missing_keys"]) - set(may_be_missing))
    if wrong := missing + sorted(map(str, loaded["mismatched_keys"])):
        raise cli.InputError(f"{name} lacks {len(wrong)} weights, such as {wrong[0]}: give a whole checkpoint")


def nf4(quantize, dtype, skipped=None):
    """How to load a network in 4 bits; None without `quantize`. skipped: modules that stay as they are."""
    if not quantize:
        return None
    cli.need("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def add_lora(network, settings, targets, **options):
    """The network with a fresh adapter by --rank, --alpha and --dropout, its base frozen. targets: of module names."""
    from peft import LoraConfig, get_peft_model

    sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    return get_peft_model(network, LoraConfig(target_modules=targets, **sizes, **options))


def trained(network):
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def save(network, folder, processor=None):
    """A checkpoint, or an adapter in PEFT's format, whole or not at all."""
    from peft import PeftModel

    # The adapters have no embeddings, so no look at the hub
    options = {"save_embedding_layers": False} if isinstance(network, PeftModel) else {}
    with files.whole(folder) as temporary:
        network.save_pretrained(temporary, **options)
        if processor:
            processor.save_pretrained(temporary)


def autocast():
    """bfloat16 arithmetic on CUDA; plain float32 on a CPU, where it would be slower."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available())


def peak_memory():
    """Largest memory in use so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, steps, peak, warmup):
    """Rate of a step (counted from 0): linear over the warmup steps up to the peak, then a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def update(optimiser, parts, rate, clip, step):
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


def train(network, items, step_size, parts_of, settings, seed, path):
    """Train on all items for --epochs, each step `step_size` of them, in an order by seed and epoch; AdamW.

    parts_of: the items of a step -> what `update` takes. Writes a line of the log `path` a step. Returns how many steps
    and weights, and the seconds it took.
    """
    weights, started = trained(network).values(), time.perf_counter()
    count, total = (sum(weight.numel() for weight in some) for some in (weights, network.parameters()))
    print(f"training {count:,} of {total:,} weights ({count / total:.2%}), seed {seed}")
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    epochs = [data.epoch_steps(len(items), step_size, seed, epoch) for epoch in range(1, settings.epochs + 1)]
    steps = sum(map(len, epochs))
    warmup = math.ceil(settings.warmup * steps)
    network.train()
    with open(path, "w") as log, tqdm(total=steps, desc=f"training, seed {seed}", unit="step") as bar:
        for epoch, orders in enumerate(epochs, 1):
            for indices in orders:
                rate = learning_rate(bar.n, steps, settings.learning_rate, warmup)
                parts = parts_of([items[i] for i in indices])
                line = {"epoch": epoch, **update(optimiser, parts, rate, settings.clip, bar.n + 1)}
                print(json.dumps(line), file=log, flush=True)
                bar.update()
                bar.set_postfix_str(f"loss {line['loss']:.4f}, gradient {line['gradient_norm']:.2f}")
    return {"steps": steps, "trained_weights": count, "seconds": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def resampled_ratio(numerator, denominator, speakers, seed=0):
    """sum(numerator) / sum(denominator), both (N,), for resampled speakers, (RESAMPLES,); nan where that is 0 / 0."""
    weights = metrics.speaker_weights(speakers, seed=seed)  # (RESAMPLES, N)
    with np.errstate(invalid="ignore"):
        return weights @ numerator / (weights @ denominator)


def wilson(count, total):
    """Wilson's interval of a share, (low, high), for items that are independent."""
    low, high = stats.binomtest(count, total).proportion_ci(metrics.LEVEL, "wilson")
    return float(low), float(high)
