"""How does a run go on, survive, and show itself: schedule, update, processes, being stopped, checkpoints, curves.

Every function works in a plain `python train.py` as well: one process, rank 0. Under torchrun all processes call the
functions marked "together", in the same order.
"""

import json
import math
import os
import random
import resource
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, PositiveInt
from torch.distributed.tensor import DTensor, distribute_tensor

from support import cli, files

CHECKPOINTS_KEPT = 2  # the newest, and the one before it in case the newest cannot be read
PATIENCE = timedelta(hours=1)  # while rank 0 writes a checkpoint (51 GB with --strategy full) the others wait
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of the parameter's shape
CHECKPOINT_NAME = "step-????????.pt"
LAUNCHER_SEEN = 1.0  # seconds between two looks at whether torchrun lives


def _finite(tensor):
    if not (tensor.is_floating_point() and tensor.isfinite().all()):
        raise ValueError("not finite numbers of floating point")
    return tensor


Weights = Annotated[InstanceOf[torch.Tensor], AfterValidator(_finite)]


class Moments(files.Shape):
    """What AdamW keeps of a parameter."""

    step: Weights
    exp_avg: Weights
    exp_avg_sq: Weights


class Optimiser(files.Shape):
    """The moments by the parameter's number; AdamW's settings are those of the run."""

    state: Annotated[dict[int, Moments], Field(min_length=1)]


class Checkpoint(files.Shape):
    """What a checkpoint holds; see save_checkpoint."""

    step: PositiveInt
    weights: dict[str, Weights]
    optimiser: Optimiser
    random: Annotated[list[dict[str, Any]], Field(min_length=1)]  # of each process
    settings: dict[str, Any]
    corpus: str


class LogLine(files.Shape):
    """What of a line of log.jsonl is read again."""

    step: PositiveInt
    loss: float
    learning_rate: float


class ValidationLine(files.Shape):
    """What of a line of validation.jsonl is read again; the other numbers are kept as they are."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    epoch: PositiveInt
    best: bool
    step: PositiveInt
    loss: float


# ----------------------------------------------------------------------------------------------------------------------
# One update


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


def update(optimiser, weights, loss, clip, not_finite):
    """Clip the gradient's norm, update the weights, and return the norm as it was before clipping; together.

    loss: of the step, a number. Where it or the gradient is not finite, the error not_finite(loss, norm) is raised
    before the update: a single such value would spoil every weight.
    """
    norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(weights, clip)))
    if not math.isfinite(loss + norm):
        raise not_finite(loss, norm)
    optimiser.step()
    optimiser.zero_grad()
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def start_processes():
    """Join the other processes that torchrun started, one for each GPU; nothing to do without torchrun.

    Rank 0 alone prints: the standard output of the others is closed. Where torchrun is killed its processes end.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # not under another launcher, which may leave its processes to themselves
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    if cli.process_rank():
        sys.stdout = open(os.devnull, "w")


def _end_with(launcher):
    """torchrun ends its processes itself, unless it was killed: then they would go on, or wait for each other."""
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_SEEN)
    os._exit(1)  # files are renamed when they are whole, so nothing half written is left in a file's place


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values):
    """Sums over all processes, a list of floats; together."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value):
    """The values of all processes, in the order of ranks; together."""
    if not dist.is_initialized():
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def whole_tensor(tensor):
    """A tensor as it would be in one process; together where FSDP2 holds it in pieces."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def on_rank_0(tensor):
    """The whole tensor on the CPU of rank 0, and None elsewhere: a machine has room for one copy; together."""
    tensor = whole_tensor(tensor)
    return tensor.cpu() if cli.process_rank() == 0 else None


def like(tensor, other):
    """The inverse of `whole_tensor`: cut into pieces where `other` is, and on its device; together."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


# ----------------------------------------------------------------------------------------------------------------------
# Being stopped


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the loop can save and leave; a second signal ends the process at once."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.name = None  # of the signal that came

    def __enter__(self):
        self.before = [signal.signal(number, self._note) for number in self.signals]
        return self

    def __exit__(self, *error):
        for number, handler in zip(self.signals, self.before):
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: this step is finished and saved first; once more to stop at once", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: all that a run needs to go on to the same weights, to the bit


def save_checkpoint(folder, step, weights, optimiser, settings, corpus):
    """Write folder/step-N.pt and remove all but the newest CHECKPOINTS_KEPT; together.

    weights: {name: parameter} of what trains; settings: plain values; corpus: fingerprint of the data.
    """
    saved = optimiser.state_dict()
    state = {
        "step": step,
        "weights": {name: on_rank_0(parameter) for name, parameter in weights.items()},
        "optimiser": saved
        | {
            "state": {
                i: {key: on_rank_0(value) for key, value in values.items()} for i, values in saved["state"].items()
            }
        },
        "random": gather(_random_state()),
        "settings": settings,
        "corpus": corpus,
    }
    if cli.process_rank() == 0:
        with files.whole(Path(folder) / f"step-{step:08d}.pt") as temporary, open(temporary, "wb") as file:
            _write(state, file)
        for old in checkpoints(folder)[:-CHECKPOINTS_KEPT]:
            old.unlink()


def _write(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # where the disk is full, torch speaks of positions in the file, and the system's reason is behind it
        raise error.__context__ or error from error


def checkpoints(folder):
    """The checkpoints in a folder, oldest first."""
    return sorted(Path(folder).glob(CHECKPOINT_NAME))


def read_checkpoint(path):
    """The state in a checkpoint. Only tensors and plain values are read: nothing in the file is executed.

    Raises InputError when the file is not a whole checkpoint; it names the one before it.
    """
    older = [file for file in checkpoints(path.parent) if file.name < path.name]
    way = f"the one before it: --resume {older[-1]}" if older else "there is no older one"
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
    """Put a checkpoint's weights, optimiser and random numbers back; together.

    The random numbers come back only to as many processes as there were. Raises InputError when the weights differ.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = state["optimiser"]["state"]
    fits = _shapes(weights) == _shapes(state["weights"]) and moments.keys() <= set(range(len(parameters)))
    if not (fits and all(moments[i][key].shape == parameters[i].shape for i in moments for key in MOMENTS)):
        raise cli.InputError("the checkpoint's weights are those of another model")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(like(state["weights"][name], parameter))
    moments = {
        i: {key: like(value, parameters[i]) if value.ndim else value for key, value in values.items()}
        for i, values in moments.items()
    }
    optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
    if len(state["random"]) == processes():
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


# ----------------------------------------------------------------------------------------------------------------------
# What a run shows


@contextmanager
def open_log(path, step):
    """log.jsonl to append to, without the lines of steps that will be done again; of rank 0 alone."""
    if cli.process_rank():
        yield open(os.devnull, "w")
        return
    lines = files.read_text(path).splitlines() if path.exists() else []
    known = files.read_lines(path, LogLine, cut_off=True) if path.exists() else []
    if repeated := [later.step for earlier, later in pairwise(known) if later.step <= earlier.step]:
        raise cli.InputError(f"{path} has step {repeated[0]} behind a later one, or twice: repair it, or move it away")
    kept = [line for line, values in zip(lines, known) if values.step <= step]
    with files.whole(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
    with open(path, "a") as file:
        yield file


@contextmanager
def tracker(service, output, settings, step):
    """A function (step, numbers) that shows numbers in `service`: "tensorboard", "wandb" or None; of rank 0 alone.

    step: that the run goes on from. TensorBoard forgets what came after it; in wandb each part is a run of its own.
    """
    if service == "tensorboard" and cli.process_rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(output / "tensorboard", purge_step=step + 1) as writer:
            yield lambda step, numbers: [writer.add_scalar(key, value, step) for key, value in _numbers(numbers)]
    elif service == "wandb" and cli.process_rank() == 0:
        import wandb

        with wandb.init(project="pronunciation", name=str(output), dir=output, config=settings) as run:
            yield lambda step, numbers: run.log(dict(_numbers(numbers)), step=step)
    else:
        yield lambda step, numbers: None


def _numbers(values):
    return [(key, value) for key, value in values.items() if value is not None]


def draw_curves(output):
    """curves.png: loss and learning rate of every step in log.jsonl; by rank 0 alone."""
    if cli.process_rank():
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, title in zip(axes, ("loss", "learning_rate"), ("loss per supervised token", "learning rate")):
        axis.plot(steps, [line[key] for line in lines], linewidth=1, marker="." if len(lines) < 20 else None)
        axis.set(xlabel="step", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    validation = output / "validation.jsonl"
    if validation.exists():
        epochs = [json.loads(line) for line in validation.read_text().splitlines()]
        axes[0].plot([e["step"] for e in epochs], [e["loss"] for e in epochs], "o-", label="held-out speakers")
        axes[0].legend()
    with files.whole(output / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def peak_memory():
    """Largest memory in use so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
