"""A run: where it stands, what it writes into its folder, when it saves and when it stops.

The training loop asks it in one line for each of these, so that nothing stands between two lines of the method.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
import json
import math
import signal
import sys
import time

from tqdm import tqdm

from support import checkpoints, cli, files, log, memory, processes, screen

ESTIMATE_AFTER = 10  # steps
PROGRESS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Stopped(Exception):
    """Ends a run that was asked to stop, after it has saved."""


@contextmanager
def open_run(settings, identity, corpus, per_epoch):
    """Own --output, and yield its Run; a stop that was asked for ends the context without an error.

    settings: of train.py; identity: those that a checkpoint must have been saved with; corpus: fingerprint of the data;
    per_epoch: steps of an epoch. Raises InputError when another run has the folder, or what is there does not fit.
    """
    with files.lock(settings.output, "train", "--output"), ExitStack() as open_files:
        files.make_folder(settings.output / "checkpoints", "--output")
        # Rank 0 looks before any process goes on to write
        chosen = (
            None if cli.process_rank() else checkpoints.choose(settings.output, settings.resume, settings.checkpoint)
        )
        (path, *_) = processes.gather(chosen)
        if settings.resume and not path:
            print(f"no checkpoint in {settings.output}/checkpoints: the run begins at the start")
        steps = per_epoch * settings.epochs
        state = checkpoints.read(path, identity, corpus, steps) if path else None
        run = Run(settings, identity, corpus, per_epoch, state, open_files)
        try:
            yield run
        except Stopped:
            run.say(f"stopped after step {run.step}, which is saved: the same command with --resume goes on")


class Run:
    """See open_run. Every rank has one; rank 0 alone writes and shows."""

    def __init__(self, settings, identity, corpus, per_epoch, state, open_files):
        self.output, self.settings = settings.output, settings
        self.identity, self.corpus, self.per_epoch = identity, corpus, per_epoch
        self.steps = per_epoch * settings.epochs
        self.step = state["step"] if state else 0  # the last one that is done
        self.epoch = max(1, math.ceil(self.step / per_epoch))
        self._state, self._open = state, open_files
        self._timed = self._seconds = 0  # steps since the start of this process, and what they took

    def start(self, weights, optimiser, record):
        """Write settings.json, put a checkpoint back, and begin to log; collective.

        weights: {name: parameter} of what trains; record: settings as they are used, plain values.
        """
        self._show_settings(record)
        with files.whole(self.output / "settings.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
        self.weights, self.optimiser = weights, optimiser
        if self._state:
            checkpoints.restore(self._state, weights, optimiser)
            saved_by, now = len(self._state["random"]), processes.count()
            print(f"resumed after step {self.step}")
            if saved_by != now:
                print(f"saved by {saved_by} processes, now {now}: dropout will be another")
            self._state = None
        (self.validated, *_) = processes.gather(log.read_validated(self.output / "validation.jsonl", self.step))
        self._began = self._saved = time.perf_counter()
        enter = self._open.enter_context
        self._stop = enter(StopRequest())
        self._log = enter(log.open_log(self.output / "log.jsonl", self.step))
        self._track = enter(log.tracker(self.settings.track, self.output, record, self.step))
        bar = {"bar_format": PROGRESS, "ncols": screen.width(sys.stderr), "disable": cli.process_rank() > 0}
        self._bar = enter(tqdm(total=self.steps, initial=self.step, **bar))

    def _show_settings(self, record):
        """Print what differs from the defaults; settings.json has all."""
        defaults = json.loads(json.dumps(asdict(type(self.settings)()), default=str))
        changed = {key: (record[key], default) for key, default in defaults.items() if record[key] != default}
        rows = [(cli.flag(key), ["-" if v is None else str(v) for v in pair]) for key, pair in changed.items()]
        screen.show_table("Settings that are not the defaults", ["this run", "default"], rows, numbers=False)
        print(f"all of them: {self.output}/settings.json\n")

    # ------------------------------------------------------------------------------------------------------------------
    # Where it stands

    def epochs(self):
        """The epochs that are not done; the one of a checkpoint at its end comes again, for what follows its steps."""
        for epoch in range(self.epoch, self.settings.epochs + 1):
            self.epoch = epoch
            yield epoch

    def left(self, order):
        """The steps of this epoch's order that are not done."""
        self._clock = time.perf_counter()
        return order[len(order) - (self.epoch * self.per_epoch - self.step) :]

    @property
    def at_last_step(self):
        """Whether the next step to be recorded is the epoch's last."""
        return self.step + 1 == self.epoch * self.per_epoch

    # ------------------------------------------------------------------------------------------------------------------
    # What it writes and shows

    def record(self, numbers):
        """Count, log and show a step that is done; save when that is due. Raises Stopped when asked to; collective."""
        seconds = time.perf_counter() - self._clock
        self.step += 1
        line = {"step": self.step, "epoch": self.epoch, **numbers, "seconds": seconds}
        line |= {"tokens_per_second": numbers["tokens"] / seconds, "memory_gb": memory.peak()}
        print(json.dumps(line), file=self._log, flush=True)
        self._track(self.step, line)
        self._bar.update()
        self._bar.set_postfix_str(_progress(line))
        self._timed, self._seconds = self._timed + 1, self._seconds + seconds
        if self._timed == ESTIMATE_AFTER and self.step < self.steps:
            self.say(_estimate(self._seconds, self.steps - self.step))
        self._save_when_due()
        self._clock = time.perf_counter()

    def _save_when_due(self):
        """After an epoch, in time, or before a stop. The clock is rank 0's, and a signal to one process stops all."""
        late = cli.process_rank() == 0 and time.perf_counter() - self._saved > 60 * self.settings.save_minutes
        stopping, due = processes.total(self._stop.name is not None, late)
        if stopping or due or self.step == self.epoch * self.per_epoch:
            folder = self.output / "checkpoints"
            checkpoints.save(folder, self.step, self.weights, self.optimiser, self.identity, self.corpus)
            self._saved = time.perf_counter()
        if stopping:
            raise Stopped

    def say(self, text):
        """Print a line above the progress bar."""
        if cli.process_rank() == 0:
            screen.say(text)

    def record_validation(self, numbers, shown):
        """Log the numbers of this epoch on held-out speakers; shown: {title: key} of those that are printed."""
        self.validated[self.epoch] = numbers = {"step": self.step} | numbers
        best = self.best_epoch
        found = [f"{title} {numbers[key]:.3f}" for title, key in shown.items() if numbers.get(key) is not None]
        verdict = "the best so far" if self.epoch == best else f"epoch {best} is the best so far"
        self.say(f"epoch {self.epoch} on held-out speakers: {' '.join(found)}; {verdict}")
        log.write_validated(self.output / "validation.jsonl", self.validated, best)
        self._track(self.step, {f"validation_{key}": value for key, value in numbers.items()})

    @property
    def best_epoch(self):
        """The epoch with the lowest validation loss (our choice: it is what training lowers)."""
        return min(self.validated, key=lambda epoch: self.validated[epoch]["loss"])

    def out_of_patience(self):
        """Whether --patience epochs have gone by without a lower validation loss; says so."""
        patience = self.settings.patience
        if not patience or self.epoch - self.best_epoch < patience:
            return False
        self.say(f"no lower validation loss for {patience} epochs: stopping early, after epoch {self.epoch}")
        return True

    def finish(self):
        """Draw the curves, and say what there is."""
        self._bar.close()
        log.draw_curves(self.output)
        seconds = time.perf_counter() - self._began
        print(f"{self.step} steps, {seconds:.0f} s, peak memory {memory.peak():.1f} GB")
        print(f"adapters in {self.output}/epoch-*; next: python evaluate.py --adapter {self.output}/")


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


def _progress(line):
    return (
        f"{line['tokens_per_second']:,.0f} tokens/s, loss {line['loss']:.3f}, lr {line['learning_rate']:.1e}, "
        f"grad {line['gradient_norm']:.2f}"
    )


def _estimate(seconds, left):
    rest = timedelta(seconds=round(seconds / ESTIMATE_AFTER * left))
    return (
        f"{ESTIMATE_AFTER} steps took {seconds:.1f} s: about {rest} (h:mm:ss) for the other {left}, without validation"
    )


def not_finite(step, micro_batches, losses, loss, gradient_norm):
    """The error of a step whose loss or gradient is not finite, naming the utterances it can come from; collective."""
    suspects = [batch for batch, value in zip(micro_batches, losses) if not value.isfinite()]
    named = (set().union(*(batch.utterances for batch in batches)) for batches in (suspects, micro_batches))
    suspected, all_of_them = (set().union(*processes.gather(names)) for names in named)
    return cli.RunError(
        f"step {step}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}. The step was not applied and the last "
        f"checkpoint is as it was. It comes from one of: {', '.join(sorted(suspected or all_of_them))}"
    )
