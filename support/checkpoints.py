"""Checkpoints: all that a run needs to go on to the same weights, to the bit."""

import random
from typing import Annotated, Any
import zipfile

import numpy as np
from pydantic import AfterValidator, Field, InstanceOf, PositiveInt
import torch

from support import cli, files, processes

KEPT = 2  # the newest, and the one before it in case the newest cannot be read
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the parameter's shape
NAME = "step-????????.pt"
# What a run writes into its folder
WRITTEN = ("settings.json", "log.jsonl", "validation.jsonl", "curves.png", "epoch-*", "checkpoints/step-*.pt")


def _finite(tensor):
    if not (tensor.is_floating_point() and tensor.isfinite().all()):
        raise ValueError("not finite numbers of floating point")
    return tensor


Weights = Annotated[InstanceOf[torch.Tensor], AfterValidator(_finite)]


class RunSettings(files.Shape):
    """What tells that a settings.json is a run's."""

    strategy: str
    speech_adapter: str
    epochs: PositiveInt
    seed: int


class Moments(files.Shape):
    """What AdamW keeps of a parameter."""

    step: Weights
    exp_avg: Weights
    exp_avg_sq: Weights


class Optimiser(files.Shape):
    """The moments by the parameter's number; AdamW's settings are those of the run."""

    state: Annotated[dict[int, Moments], Field(min_length=1)]


class Checkpoint(files.Shape):
    """What a checkpoint holds; see `save`."""

    step: PositiveInt
    weights: dict[str, Weights]
    optimiser: Optimiser
    random: Annotated[list[dict[str, Any]], Field(min_length=1)]  # of each process
    settings: dict[str, Any]
    corpus: str


def choose(run, resume, named):
    """The checkpoint to go on from, or None for a run from the start.

    resume: whether to go on with the run in this folder, from its newest checkpoint or the `named` one. Raises
    InputError when the folder holds something else: without `resume` any file of a run, with it files of these names
    that train.py did not write.
    """
    there = [path for name in WRITTEN for path in sorted(run.glob(name))] if run.is_dir() else []
    there = [path for path in there if not path.name.startswith(".")]
    found = [path for path in there if path.parent != run]
    if there and not resume:
        raise cli.InputError(
            f"{there[0]} is there already: --resume goes on with the run in {run}, another --output leaves it be"
        )
    if run / "settings.json" in there or (there and not found):  # a run writes it before all else
        files.read_json(run / "settings.json", RunSettings)
    if named and not named.is_file():
        raise cli.InputError(f"checkpoint {named} is missing; {run} has {', '.join(map(str, found)) or 'none'}")
    return named or (found[-1] if found else None)


def read(path, settings, corpus, steps):
    """The state in a checkpoint of this run. Only tensors and plain values are read: nothing in the file is executed.

    Raises InputError when the file is not a whole checkpoint, naming the one before it, or when it is of a run with
    other settings, on another corpus, or of fewer steps.
    """
    state = _read_whole(path)
    other = [
        f"{cli.flag(key)} {state['settings'].get(key)}, not {value}"
        for key, value in settings.items()
        if state["settings"].get(key) != value
    ]
    if other:
        raise cli.InputError(
            f"checkpoint {path} is of a run with {'; '.join(other)}: resume with its settings, or choose another "
            f"--output"
        )
    if state["corpus"] != corpus:
        raise cli.InputError(
            f"checkpoint {path} is of a run on another corpus, or on other labels of it: resume with its --data and "
            f"--limit, or choose another --output"
        )
    if state["step"] > steps:
        raise cli.InputError(
            f"checkpoint {path} is of step {state['step']:,}, and the run has {steps:,}: choose another one"
        )
    return state


def save(folder, step, weights, optimiser, settings, corpus):
    """Write folder/step-N.pt and remove all but the newest KEPT; collective.

    weights: {name: parameter} of what trains; settings: plain values; corpus: fingerprint of the data.
    """
    saved = optimiser.state_dict()
    moments = {i: {key: processes.on_rank_0(v) for key, v in of.items()} for i, of in saved["state"].items()}
    state = {
        "step": step,
        "weights": {name: processes.on_rank_0(parameter) for name, parameter in weights.items()},
        "optimiser": saved | {"state": moments},
        "random": processes.gather(_random_state()),
        "settings": settings,
        "corpus": corpus,
    }
    if cli.process_rank() == 0:
        with files.whole(folder / f"step-{step:08d}.pt") as temporary, open(temporary, "wb") as file:
            _write(state, file)
        for old in sorted(folder.glob(NAME))[:-KEPT]:
            old.unlink()


def _write(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # where the disk is full, torch speaks of positions in the file, and the system's reason is behind it
        raise error.__context__ or error from error


def _read_whole(path):
    older = [file for file in sorted(path.parent.glob(NAME)) if file.name < path.name]
    way = f"the one before it: --resume --checkpoint {older[-1]}" if older else "there is no older one"
    try:
        if not path.is_file():  # a FIFO would be waited for, a device read for ever
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:  # torch.save writes a checksum of each tensor, and torch.load reads none
            if spoilt := archive.testzip():
                raise ValueError(f"the checksum of {spoilt} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        files.check(Checkpoint, state, path)
    except Exception as error:  # torch raises many kinds for what is not its own file
        raise cli.InputError(f"checkpoint {path} is cut off, damaged, or not one of train.py; {way}") from error
    return state


def restore(state, weights, optimiser):
    """Put a checkpoint's weights, optimiser and random numbers back; collective.

    The random numbers come back only to as many processes as there were. Raises InputError when the weights differ.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = state["optimiser"]["state"]
    fits = _shapes(weights) == _shapes(state["weights"]) and moments.keys() <= set(range(len(parameters)))
    if not (fits and all(moments[i][key].shape == parameters[i].shape for i in moments for key in MOMENTS)):
        raise cli.InputError("the checkpoint's weights are those of another model")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(processes.like(state["weights"][name], parameter))
    moments = {
        i: {key: processes.like(value, parameters[i]) if value.ndim else value for key, value in values.items()}
        for i, values in moments.items()
    }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    if len(state["random"]) == processes.count():
        try:
            _set_random_state(state["random"][cli.process_rank()])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise cli.InputError(f"the checkpoint's random numbers are damaged: {cli.first_line(error)}") from error


def _shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def _random_state():
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
