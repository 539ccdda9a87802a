"""A run and its folder: settings, log, checkpoints, adapters of its epochs; when it saves, and when it stops.

The training loop asks it in one line for each of these, so that nothing stands between two lines of the method.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
import json
import math
import os
from pathlib import Path
import random
import re
import resource
import signal
import sys
import time
from typing import Annotated, Any, Literal
import zipfile

import numpy as np
from pydantic import Field

import prompts
from support import cli, files
from support.later import when_used

with when_used():
    from matplotlib import figure
    import torch

    from support import processes

HUB_MODEL = "microsoft/Phi-4-multimodal-instruct"
HUB_MODEL_REVISION = "refs/pr/70"  # the checkpoint in the format of transformers' own classes; never merged into main

Strategy = Literal["lora", "unfreeze"]  # model.STRATEGIES says what trains
SpeechAdapter = Literal["merge", "continue", "none"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Dtype = Literal["float32", "bfloat16"]
Rank = Annotated[int, Field(ge=1, le=3072)]  # the width of the real model: no matrix of it has a higher rank
Quantize = Literal["nf4"]
Weights = dict[str, "torch.nn.Parameter"]  # of what trains, by name

MARK = "settings.json"
WRITTEN = (MARK, "log.jsonl", "curves.png", "epoch-*", "checkpoints")
KEPT = 2  # checkpoints: the newest, and the one before it in case the newest cannot be read
SMOOTHED = 25  # our choice: a point of the smoothed curves is a mean over one part of so many
PROGRESS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Stopped(Exception):
    """Ends a run that was asked to stop, after it has saved."""


class TrainingSettings(files.Shape):
    """What of an adapter's settings.json is read again."""

    epoch: Annotated[int, Field(ge=1, le=cli.LARGEST)]
    strategy: Strategy
    speech_adapter: SpeechAdapter
    model: str
    data: str
    revision: str | None = None
    data_revision: str | None = None
    data_reader: str | None = None
    dtype: Dtype | None = None
    attention: Attention | None = None
    quantize: Quantize | None = None
    max_tokens: cli.Count = 2048
    prompts: str | None = None  # their digest; None: of an older version of this project
    validation_loss: float | None = None  # per supervised token, on held-out speakers


# ----------------------------------------------------------------------------------------------------------------------
# The run


@contextmanager
def open_run(settings: Any, record: dict[str, Any], corpus: str, per_epoch: int) -> Iterator["Run"]:
    """Own --output, write settings.json, and yield the Run; a stop that was asked for ends it without an error.

    settings: of train.py; record: the same with all that settings.json keeps, plain values; corpus: fingerprint of the
    data; per_epoch: steps of an epoch. Raises InputError when another run has the folder, or what is there does not
    fit. Collective.
    """
    path = settings.output / MARK
    with files.own(settings.output, "train.py", MARK, WRITTEN), ExitStack() as opened:
        if not settings.resume and cli.process_rank() == 0 and path.exists():
            raise cli.InputError(f"{path} is there already: --resume goes on with that run, another --output leaves it")
        files.write_json(path, {"written_by": files.signature("train.py")} | record)
        run = Run(settings, corpus, per_epoch, opened)
        try:
            yield run
        except Stopped:
            run.say(f"stopped after step {run.step}, which is saved: the same command with --resume goes on")


class Run:
    """See open_run. Every rank has one; rank 0 alone writes and shows."""

    def __init__(self, settings: Any, corpus: str, per_epoch: int, opened: ExitStack) -> None:
        self.output, self.settings, self.corpus, self.per_epoch = settings.output, settings, corpus, per_epoch
        self.steps = per_epoch * settings.epochs
        found = sorted(self.output.glob("checkpoints/step-*.pt")) if settings.resume else []
        step = int(found[-1].stem[5:]) if found else 0
        epoch, more = divmod(step, per_epoch)
        if step and not more and not (self.output / f"epoch-{epoch}").exists():
            epoch -= 1  # its steps are done, and its adapter is not there
        # the last ones that are done, as rank 0 sees the folder
        ((self._checkpoint, self.step, self.epoch), *_) = processes.gather((found[-1] if found else None, step, epoch))
        self._opened = opened

    def start(self, weights: Weights, optimiser: "torch.optim.Optimizer", record: dict[str, Any]) -> None:
        """Put a checkpoint back, and begin to log; collective. weights: {name: parameter} of what trains."""
        self.weights, self.optimiser = weights, optimiser
        if self._checkpoint:
            restore(self._checkpoint, self.corpus, weights, optimiser)
            self.say(f"resumed after step {self.step}")
        earlier = [self.output / f"epoch-{epoch}" / MARK for epoch in range(1, self.epoch + 1)]
        earlier = [files.read_json(path, TrainingSettings) for path in earlier if path.exists()]
        self.losses = {saved.epoch: saved.validation_loss for saved in earlier if saved.validation_loss is not None}
        self._began = self._saved = time.perf_counter()
        enter = self._opened.enter_context
        self._stops = enter(stop_requests())
        self._log = enter(_open_log(self.output / "log.jsonl", self.step))
        self._track = enter(_tracker(self.settings.track, self.output, record, self.step))
        self._bar = enter(cli.Progress(total=self.steps, initial=self.step, bar_format=PROGRESS))

    def epochs(self) -> Iterator[int]:
        """The epochs that are not done, until --patience is over."""
        while self.epoch < self.settings.epochs and not self._out_of_patience():
            self.epoch += 1
            yield self.epoch

    def left(self, order: np.ndarray) -> np.ndarray:
        """The steps of this epoch's order that are not done."""
        self._clock = time.perf_counter()
        return order[len(order) - (self.epoch * self.per_epoch - self.step) :]

    def record(self, numbers: dict[str, float]) -> None:
        """Count, log and show a step that is done; save when that is due. Raises Stopped when asked to; collective."""
        seconds = time.perf_counter() - self._clock
        self.step += 1
        line = {"step": self.step, "epoch": self.epoch, **numbers, "seconds": seconds}
        line |= {"tokens_per_second": numbers["tokens"] / seconds, "memory_gb": peak_memory()}
        print(json.dumps(line), file=self._log, flush=True)
        self._track(self.step, line)
        self._bar.set_postfix_str(
            f"{line['tokens_per_second']:,.0f} tokens/s, loss {line['loss']:.3f}, lr {line['learning_rate']:.1e}, "
            f"grad {line['gradient_norm']:.2f}",
            refresh=False,
        )
        self._bar.update()
        self._save_when_due()
        self._clock = time.perf_counter()

    def _save_when_due(self):
        """After an epoch, in time, or before a stop. The clock is rank 0's, and a signal to one process stops all."""
        late = cli.process_rank() == 0 and time.perf_counter() - self._saved > 60 * self.settings.save_minutes
        stopping, due = processes.total(bool(self._stops), late)
        if stopping or due or self.step == self.epoch * self.per_epoch:
            save(self.output / "checkpoints", self.step, self.weights, self.optimiser, self.corpus)
            self._saved = time.perf_counter()
        if stopping:
            raise Stopped

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if cli.process_rank() == 0:
            cli.say(text)

    def record_validation(self, loss: float) -> None:
        """Note and show this epoch's loss on held-out speakers; the lowest is the best, as training lowers it."""
        if not math.isfinite(loss):  # the epoch's adapter is worth keeping, but no choice can rest on this
            self.say(f"epoch {self.epoch}: loss {loss} on held-out speakers, which is left out")
            return
        self.losses[self.epoch] = loss
        best = self._best_epoch()
        verdict = "the best so far" if self.epoch == best else f"epoch {best} is the best so far"
        self.say(f"epoch {self.epoch}: loss {loss:.3f} on held-out speakers; {verdict}")
        self._track(self.step, {"validation_loss": loss})

    def _best_epoch(self):
        return min(self.losses, key=self.losses.get, default=0)

    def _out_of_patience(self):
        """Whether --patience epochs have gone by without a lower validation loss; says so."""
        patience = self.settings.patience
        if not patience or self.epoch - self._best_epoch() < patience:
            return False
        self.say(f"no lower validation loss for {patience} epochs: stopping early, after epoch {self.epoch}")
        return True

    def finish(self) -> None:
        """Draw the curves, and say what there is."""
        self._bar.close()
        if cli.process_rank() == 0:
            lines = files.read_lines(self.output / "log.jsonl", dict[str, float])
            drawn = curves(lines, {epoch * self.per_epoch: loss for epoch, loss in self.losses.items()})
            with files.whole(self.output / "curves.png") as temporary:
                drawn.savefig(temporary, format="png", dpi=150)
        seconds = time.perf_counter() - self._began
        self.say(f"{self.step} steps, {seconds:.0f} s, peak memory {peak_memory():.1f} GB")
        self.say(f"adapters in {self.output}/epoch-*; next: python evaluate.py --adapter {self.output}/")


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Names of SIGTERM and Ctrl-C as they come, so that the loop can save and leave; a second one ends the process."""
    names = []

    def note(number, frame):
        names.append(signal.Signals(number).name)
        print(f"\n{names[-1]}: this step is finished and saved first; once more to stop at once", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory() -> float:
    """Largest memory in use so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: all that a run needs to go on to the same weights, to the bit


def save(folder: Path, step: int, weights: Weights, optimiser: "torch.optim.Optimizer", corpus: str) -> None:
    """Write folder/step-N.pt and remove all but the newest KEPT; collective.

    weights: {name: parameter} of what trains; corpus: fingerprint of the data.
    """
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    own = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}
    state = {
        "weights": {name: parameter.detach() for name, parameter in weights.items()},
        "optimiser": optimiser.state_dict(),
        "random": processes.gather(own),
        "corpus": corpus,
    }
    if cli.process_rank():
        return
    with files.whole(folder / f"step-{step:08d}.pt") as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # where the disk is full, torch speaks of positions in the file, and the system's reason is behind it
            raise error.__context__ or error from error
    files.remove_left(folder)
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink()


def restore(path: Path, corpus: str, weights: Weights, optimiser: "torch.optim.Optimizer") -> None:
    """Put a checkpoint's weights, optimiser and random numbers back; collective.

    Only tensors and plain values are read: nothing in the file is executed. The random numbers come back only to as
    many processes as there were. Raises InputError for no whole checkpoint, or one of another model or corpus.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a checksum of each tensor, and torch.load reads none
            if spoilt := archive.testzip():
                raise ValueError(f"the checksum of {spoilt} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, own = ({n: w.shape for n, w in of.items()} for of in (state["weights"], weights))
        if saved != own:
            raise ValueError("its weights are those of another model")
        if state["corpus"] != corpus:
            raise ValueError("it is of another corpus, or of other labels of it")
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        if len(state["random"]) == processes.count():
            own = state["random"][cli.process_rank()]
            random.setstate(own["python"])
            np.random.set_state(own["numpy"])
            torch.set_rng_state(own["torch"])
            if own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"])
        else:
            cli.say(f"saved by {len(state['random'])} processes, now {processes.count()}: dropout will be another")
    except Exception as error:  # torch raises many kinds for what is not its own file
        raise cli.InputError(
            f"checkpoint {path} cannot be gone on with: {cli.first_line(error)}; without that file --resume takes the "
            f"one before it"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# Logs


@contextmanager
def _open_log(path, step):
    """log.jsonl, a line a step, to append to, without the lines of steps that will be done again; for rank 0 alone."""
    if cli.process_rank():
        yield open(os.devnull, "w")
        return
    lines = files.read_lines(path, dict[str, float], cut_off=True) if path.exists() else []
    texts = files.read_text(path).split("\n") if lines else []
    with files.whole(path) as temporary:
        temporary.write_text("".join(text + "\n" for text, line in zip(texts, lines) if line["step"] <= step))
    with open(path, "a") as file:
        yield file


@contextmanager
def _tracker(service, output, settings, step) -> Iterator[Callable[[int, dict], Any]]:
    """A function (step, numbers) that shows numbers in `service`: "tensorboard", "wandb" or None; for rank 0 alone.

    step: that the run goes on from. TensorBoard forgets what came after it; in wandb each part is a run of its own.
    """
    if service == "tensorboard" and cli.process_rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(output / "tensorboard", purge_step=step + 1) as writer:
            yield lambda step, numbers: [writer.add_scalar(key, value, step) for key, value in numbers.items()]
    elif service == "wandb" and cli.process_rank() == 0:
        import wandb

        with wandb.init(project="pronunciation", name=str(output), dir=output, config=settings) as run:
            yield lambda step, numbers: run.log(numbers, step=step)
    else:
        yield lambda step, numbers: None


def curves(lines: list[dict[str, float]], validated: dict[int, float]) -> "figure.Figure":
    """Loss and gradient norm of every step, and smoothed. lines: of log.jsonl; validated: {step: loss} of epochs."""
    picture = figure.Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = picture.subplots(2, 1, sharex=True)
    steps, width = [line["step"] for line in lines], 1 + len(lines) // SMOOTHED
    for axis, key, title in zip(axes, ("loss", "gradient_norm"), ("loss per supervised token", "gradient norm")):
        values = [line[key] for line in lines]
        axis.plot(steps, values, "C0.-", markersize=2, linewidth=1, alpha=0.35, label="each step")
        means = np.convolve(values, np.full(width, 1 / width), "valid")
        axis.plot(steps[width // 2 :][: len(means)], means, "C0", label="smoothed")
        axis.set(title=title, yscale="log")  # otherwise the first steps are all that one sees
        axis.grid(alpha=0.3, which="both")
    if validated:
        axes[0].plot(validated.keys(), validated.values(), "oC1", label="held-out speakers, after an epoch")
    axes[0].legend()
    axes[1].set_xlabel("step")
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# Adapters of a run


def adapters(run: Path, epochs: str | None) -> list[tuple[Path, TrainingSettings]]:
    """The adapters that `--adapter` and `--epochs` name, as (folder, TrainingSettings), earliest epoch first.

    epochs: "last" or None, "best", "all", or a number as text. Raises InputError where there is none.
    """
    if os.path.isfile(run / "adapter_config.json"):
        if epochs:
            raise cli.InputError(f"{run} is one epoch: leave out --epochs {epochs}, or give the folder above")
        return [(run, _settings(run))]
    found = [file.parent for file in run.glob(f"epoch-*/{MARK}")]
    found = sorted((f for f in found if re.fullmatch(r"epoch-\d+", f.name)), key=lambda f: int(f.name[6:]))
    if not found:
        raise cli.InputError(f"{run} holds no adapter (no epoch-*/{MARK}): give train.py's --output")
    settings = {folder: _settings(folder) for folder in found}
    if epochs == "best":
        validated = [item for item in settings.items() if item[1].validation_loss is not None]
        if not validated:
            raise cli.InputError(f"--epochs best: epochs of {run} were not validated; add --validation 0.1 to train.py")
        return [min(validated, key=lambda item: item[1].validation_loss)]
    chosen = {None: found[-1:], "last": found[-1:], "all": found}
    folders = chosen.get(epochs, [folder for folder in found if folder.name == f"epoch-{epochs}"])
    if not folders:
        raise cli.InputError(f"{run} has no epoch {epochs!r}: there are {', '.join(f.name for f in found)}")
    return [(folder, settings[folder]) for folder in folders]


def _settings(folder):
    """The settings of an adapter's training. Raises InputError where it was trained with other prompts."""
    settings = files.read_json(folder / MARK, TrainingSettings)
    if settings.prompts != prompts.digest():
        path, asked = folder / "prompts.json", {task: prompts.build_prompt(task) for task in prompts.TASKS}
        trained = files.read_json(path, dict[str, str]) if path.exists() else {}
        then, now = (
            [f"{task}: {line}" for task in texts for line in texts[task].split("\n")] for texts in (trained, asked)
        )
        differ = [f"{was!r} is now {new!r}" for was, new in zip_longest(then, now) if was != new]
        older = f"other prompts: {differ[0]}" if trained and differ else "an older version of this project"
        raise cli.InputError(f"{folder} was trained with {older}; use the prompts of its training, or train again")
    return settings
