"""How do examples reach the model: read, padded and looked up in worker processes, ahead of the step that needs them.

    utterance ids ─> examples ─> micro-batches ─┬─> ids and positions of what is supervised ──────────┐
                                                └─> log-mel features, or embeddings known from disk ──┴─> GPU

While audio encoder and projector are frozen the embeddings of a recording never change: they are computed once and
kept on disk (AudioCache), so that neither memory nor time grows with the passes over a corpus.

Shapes: B rows, T tokens of a row, A audio embeddings of a recording, F feature frames, D hidden size, N supervised
positions, P audio placeholders of a micro-batch.
"""

import hashlib
import io
import os
import signal
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

import data
import runtime
from support import cli

PREFETCHED = 2  # steps that each worker process prepares ahead
SILENCE = 600  # seconds without a step after which workers are given up; one is prepared in a few


# ----------------------------------------------------------------------------------------------------------------------
# Audio embeddings on disk


class AudioCache:
    """Embeddings of recordings, a file each, named by the content of the recording.

    folder: for one set of weights (SpeechModel.keep_audio names it after them). Files are read through a memory map.
    A file appears whole or not at all, and one whose checksum does not fit is as good as none.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def file(self, recording):
        """Where the embeddings of a recording, given as the bytes of its sound file, are or will be."""
        name = hashlib.blake2b(recording, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, file):
        """Embeddings (A, D), or None if they are not there."""
        try:
            with safe_open(file, framework="pt") as opened:
                embeddings = opened.get_tensor("embeddings")
                whole = opened.metadata()["crc32"] == _checksum(embeddings)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        return embeddings if whole else None

    def write(self, file, embeddings):
        """Keep embeddings (A, D), on the CPU. Processes that write the same file write the same content."""
        content = save({"embeddings": embeddings}, {"crc32": _checksum(embeddings)})
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            if file.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise cli.RunError(
                f"audio embeddings cannot be kept in {self.folder}: {error.strerror}; choose another --audio-cache"
            ) from error


def _checksum(tensor):
    return str(zlib.crc32(tensor.view(torch.uint8).numpy()))


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches


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
class MicroBatch:
    """Padded examples. What is supervised and where audio goes are positions in the rows laid end to end (B x T)."""

    input_ids: torch.Tensor  # (B, T)
    placeholders: torch.Tensor  # (P,)
    supervised: torch.Tensor  # (N,), positions whose *next* token is supervised
    targets: torch.Tensor  # (N,), those next tokens
    tokens: int  # without padding
    recordings: list[Recording] = ()  # of each row
    utterances: list[str] = ()  # id of each row

    def pin_memory(self):
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return MicroBatch(**vars(self) | tensors | {"recordings": [r.pin_memory() for r in self.recordings]})


@dataclass
class Preparation:
    """Makes micro-batches of examples; knows of the model only what a worker process can hold."""

    extractor: object  # transformers' feature extractor
    pad_id: int
    audio_id: int
    cache: AudioCache | None = None  # None: encoder or projector train, or nothing is to be kept

    def __call__(self, examples):
        batch = self.pad(examples)
        batch.recordings = [self.recording(example.utterance) for example in examples]
        batch.utterances = [example.utterance.id for example in examples]
        return batch

    def pad(self, examples):
        """A micro-batch without recordings."""
        batch = data.collate(examples, self.pad_id)
        input_ids, labels = batch["input_ids"], batch["labels"]  # (B, T)
        following = np.full_like(labels, data.IGNORE)  # (B, T): position t predicts token t+1
        following[:, :-1] = labels[:, 1:]
        supervised = np.flatnonzero(following != data.IGNORE)
        return MicroBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(np.flatnonzero(input_ids == self.audio_id)),
            torch.from_numpy(supervised),
            torch.from_numpy(following.reshape(-1)[supervised]),
            sum(map(len, examples)),
        )

    def recording(self, utterance):
        if self.cache is None:
            return Recording(features=self.features(utterance))
        file = self.cache.file(utterance.recording())
        if (embeddings := self.cache.read(file)) is not None:
            return Recording(embeddings=embeddings)
        return Recording(features=self.features(utterance), file=file)

    def features(self, utterance):
        return torch.as_tensor(data.log_mel(utterance, self.extractor))


# ----------------------------------------------------------------------------------------------------------------------
# Steps


class Steps(Dataset):
    """This process' share of some steps, each as (supervised tokens of the whole step, list of MicroBatch)."""

    def __init__(self, examples, steps, micro_batch, prepare, rank, processes):
        self.examples, self.steps, self.micro_batch, self.prepare = examples, steps, micro_batch, prepare
        self.rank, self.processes = rank, processes

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, number):
        try:
            examples = [self.examples[index] for index in self.steps[number]]
            share = data.micro_batches(examples, self.micro_batch, self.rank, self.processes)
            return sum(len(example.answer_ids) for example in examples), [self.prepare(part) for part in share]
        except (cli.InputError, cli.RunError) as error:
            return error  # raised by load_steps: DataLoader would put a traceback into its message


@contextmanager
def load_steps(examples, steps, micro_batch, prepare, workers, rank=None, processes=None):
    """An iterator over steps, prepared ahead by `workers` processes (0: by this one, when it is asked for).

    The workers end with the context: else they would outlive an error and spoil what is said about it.

    examples: data.Examples; steps: indices of each step's examples; rank and processes: whose share, by default this
    process' of all. The order, and what is in a step, do not depend on the number of workers.
    """
    rank = cli.process_rank() if rank is None else rank
    processes = runtime.processes() if processes is None else processes
    loader = DataLoader(
        Steps(examples, steps, micro_batch, prepare, rank, processes),
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
            yield supervised, [batch.pin_memory() for batch in share] if torch.cuda.is_available() else share
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
