"""Logs: what a run writes down of every step and epoch, and shows while it goes on."""

from contextlib import contextmanager
from itertools import pairwise
import json
import os

from pydantic import ConfigDict, PositiveInt

from support import cli, files


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
