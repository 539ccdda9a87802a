"""Worker processes: micro-batches are read, padded and looked up ahead of the step that needs them.

    utterance ids ─> examples ─> micro-batches ─┬─> ids and positions of what is supervised ──────────┐
                                                └─> log-mel features, or embeddings known from disk ──┴─> GPU

Shapes: A audio embeddings of a recording, F feature frames, D hidden size.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
import io
from pathlib import Path
import signal
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import data
from support import audio_cache, cli, processes

PREFETCHED = 2  # steps that each worker process prepares ahead
SILENCE = 600  # seconds without a step after which workers are given up; one is prepared in a few


@dataclass
class Recording:
    """A recording as the model takes it: embeddings where they are known, else features."""

    embeddings: torch.Tensor | None = None  # (A, D)
    features: torch.Tensor | None = None  # (F, 80)
    file: Path | None = None  # where the embeddings are to be kept

    def pin_memory(self):
        """Pinned memory is copied to a GPU while it computes."""
        pinned = {
            name: None if value is None else value.pin_memory()
            for name, value in (("embeddings", self.embeddings), ("features", self.features))
        }
        return Recording(**pinned, file=self.file)


@dataclass
class Preparation:
    """Makes micro-batches of examples; knows of the model only what a worker process can hold."""

    extractor: object  # transformers' feature extractor
    pad_id: int
    audio_id: int
    cache: audio_cache.AudioCache | None = None  # None: encoder or projector train, or nothing is to be kept

    def __call__(self, examples):
        batch = data.collate(examples, self.pad_id, self.audio_id)
        return replace(batch, recordings=[self.recording(example.utterance) for example in examples])

    def recording(self, utterance):
        if self.cache is None:
            return Recording(features=self._features(utterance))
        file = self.cache.file(utterance.recording())
        if (embeddings := self.cache.read(file)) is not None:
            return Recording(embeddings=embeddings)
        return Recording(features=self._features(utterance), file=file)

    def _features(self, utterance):
        return torch.as_tensor(data.log_mel(utterance, self.extractor))


def _pin(batch):
    """The MicroBatch in pinned memory, which is copied to a GPU while it computes."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    pinned = {name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()}
    return replace(batch, **pinned, recordings=[recording.pin_memory() for recording in batch.recordings])


# ----------------------------------------------------------------------------------------------------------------------
# Steps


class Steps(Dataset):
    """This process' share of some steps, each as (supervised tokens of the whole step, list of MicroBatch)."""

    def __init__(self, examples, steps, micro_batch, prepare, rank, world_size):
        self.examples, self.steps, self.micro_batch, self.prepare = examples, steps, micro_batch, prepare
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, number):
        try:
            examples = [self.examples[index] for index in self.steps[number]]
            share = data.micro_batches(examples, self.micro_batch, self.rank, self.world_size)
            return sum(len(example.answer_ids) for example in examples), [self.prepare(part) for part in share]
        except (cli.InputError, cli.RunError) as error:
            return error  # raised by load_steps: DataLoader would put a traceback into its message


@contextmanager
def load_steps(examples, steps, micro_batch, prepare, workers, alike=False):
    """An iterator over steps, prepared ahead by `workers` processes (0: by this one, when it is asked for).

    The workers end with the context: else they would outlive an error and spoil what is said about it.

    examples: data.Examples; steps: indices of each step's examples; alike: every process gets the whole of a step, not
    its share. The order, and what is in a step, do not depend on the number of workers.
    """
    rank, world_size = (0, 1) if alike else (cli.process_rank(), processes.count())
    loader = DataLoader(
        Steps(examples, steps, micro_batch, prepare, rank, world_size),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        # forks start at once; others import torch first, in every epoch. macOS does not survive them.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=_packed if workers else None,
        timeout=SILENCE if workers else 0,
        worker_init_fn=_leave_signals_to_the_loop,
        generator=torch.Generator(),  # DataLoader draws a seed; not from the numbers that a resumed run goes on with
    )
    prepared = _raise_errors(loader)
    try:
        yield prepared
    finally:
        prepared.close()


def _raise_errors(loader):
    try:
        for step in loader:
            step = torch.load(io.BytesIO(step), weights_only=False) if isinstance(step, bytes) else step
            if isinstance(step, Exception):
                raise step
            supervised, share = step
            yield supervised, [_pin(batch) for batch in share] if torch.cuda.is_available() else share
    except RuntimeError as error:
        if not loader.num_workers:
            raise
        raise cli.RunError(
            f"a worker process failed: {cli.first_line(error)} Perhaps memory is short, or shared memory (/dev/shm): "
            f"--workers 0 does without, and --resume goes on"
        ) from error


def _packed(step):
    """A step as bytes, which go through the queue's pipe.

    A tensor that a worker hands over as such is a file descriptor until the step is done, some 200 a step: where they
    run out, the queue's thread dies, and the loop would wait for ever.
    """
    buffer = io.BytesIO()
    torch.save(step, buffer)
    return buffer.getvalue()


def _leave_signals_to_the_loop(worker):
    """Ctrl-C in a terminal goes to all its processes, but the step is to be finished: workers end with the loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
