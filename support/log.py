"""Logs: what a run writes down of every step and epoch, and shows while it goes on."""

from contextlib import contextmanager
from itertools import pairwise
import json
import math
import os

from pydantic import ConfigDict, PositiveInt

from support import cli, files

SMOOTHED = 50  # our choice: a point of the smoothed curves is a mean over one part of so many to either side


class LogLine(files.Shape):
    """What of a line of log.jsonl is read again."""

    step: PositiveInt
    loss: float
    learning_rate: float
    epoch: PositiveInt | None = None  # this and the norm are drawn alone
    gradient_norm: float = math.nan


class ValidationLine(files.Shape):
    """What of a line of validation.jsonl is read again; the other numbers are kept as they are."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    epoch: PositiveInt
    best: bool
    step: PositiveInt
    loss: float


@contextmanager
def open_log(path, step):
    """log.jsonl to append to, without the lines of steps that will be done again; for rank 0 alone."""
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
    """A function (step, numbers) that shows numbers in `service`: "tensorboard", "wandb" or None; for rank 0 alone.

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
    """curves.png of a run; by rank 0 alone."""
    if cli.process_rank():
        return
    with files.whole(output / "curves.png") as temporary:
        curves(output).savefig(temporary, format="png", dpi=150)


def curves(run):
    """Loss, learning rate and gradient norm of every step in log.jsonl, and validation, as a matplotlib Figure.

    Raises InputError for a log that cannot be read.
    """
    from matplotlib import figure, ticker  # takes a second

    lines = files.read_lines(run / "log.jsonl", LogLine, cut_off=True)
    steps = [line.step for line in lines]
    picture = figure.Figure(figsize=(6.4, 5), layout="constrained")
    axes = picture.subplot_mosaic([["loss", "loss"], ["learning_rate", "gradient_norm"]], height_ratios=(3, 2))
    titles = {"loss": "loss per supervised token", "learning_rate": "learning rate", "gradient_norm": "gradient norm"}
    for key, title in titles.items():
        values = [getattr(line, key) for line in lines]
        smooth = key != "learning_rate"
        dots = "." if len(lines) < 20 else None
        axes[key].plot(steps, values, "C0", linewidth=1, alpha=0.35 if smooth else 1, marker=dots, label="each step")
        if smooth:
            axes[key].plot(steps, smoothed(values), "C0", label="smoothed")
            axes[key].set_yscale("log")  # otherwise the first steps are all that one sees
            axes[key].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes[key].yaxis.set_major_formatter("{x:g}")
            axes[key].yaxis.set_minor_formatter(ticker.NullFormatter())
        for earlier, later in pairwise(lines):
            if earlier.epoch != later.epoch:
                axes[key].axvline(earlier.step + 0.5, color="C7", linestyle=":", linewidth=1)
        axes[key].set(title=title, xlabel="step")
        axes[key].grid(alpha=0.3)
    if (run / "validation.jsonl").exists():
        epochs = files.read_lines(run / "validation.jsonl", ValidationLine)
        axes["loss"].plot([e.step for e in epochs], [e.loss for e in epochs], "oC1", label="held-out speakers")
    axes["loss"].set_xlabel("step; dotted: the end of an epoch")
    axes["loss"].legend()
    return picture


def smoothed(values):
    """The mean around every step, over 1 / SMOOTHED of the run to either side."""
    reach = len(values) // SMOOTHED
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def read_validated(path, step):
    """Validation results up to the step that a run goes on from, as {epoch: numbers}."""
    lines = files.read_lines(path, ValidationLine) if path.exists() else []
    if len({line.epoch for line in lines}) < len(lines):
        raise cli.InputError(f"{path} has an epoch twice: remove one")
    return {line.epoch: line.model_dump(exclude={"epoch", "best"}) for line in lines if line.step <= step}


def write_validated(path, validated, best):
    """validation.jsonl: a line an epoch, the best one marked."""
    lines = [{"epoch": epoch, "best": epoch == best, **numbers} for epoch, numbers in validated.items()]
    with files.whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
