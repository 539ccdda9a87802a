"""Audio embeddings on disk, and the worker processes that read them ahead."""

from dataclasses import replace
from functools import partial
import multiprocessing
import os
from pathlib import Path
import signal
import time

import numpy as np
from processes import Process
import psutil
import pytest
from support.audio_cache import AudioCache
from support.workers import load_steps
import torch

import data
from support import cli, files
from support.run import StopRequest

# ----------------------------------------------------------------------------------------------------------------------
# Embeddings on disk


@pytest.fixture
def cache(tmp_path):
    return AudioCache(tmp_path / "cache")


def embeddings(seed=0, dtype=torch.float32):
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_to_the_bit_and_a_file_is_of_a_recordings_content(cache, dtype):
    file = cache.file(b"a recording")
    assert cache.read(file) is None and file == AudioCache(cache.folder).file(b"a recording") != cache.file(b"another")
    cache.write(file, embeddings(dtype=dtype))
    found = cache.read(file)
    assert found.dtype == dtype and torch.equal(found, embeddings(dtype=dtype))


def test_a_file_that_is_not_whole_counts_as_missing_and_is_written_again(cache):
    """After a loss of power a file can have its whole length, and zeros in the place of its last blocks."""
    file = cache.file(b"a recording")
    cache.write(file, embeddings())
    content = file.read_bytes()
    cuts = [content[:length] for length in (0, 1, 7, 8, 9, 60, len(content) // 2, len(content) - 1)]
    for damaged in (*cuts, content[:-100] + bytes(100)):
        file.write_bytes(damaged)
        assert cache.read(file) is None, len(damaged)
    cache.write(file, embeddings())
    assert torch.equal(cache.read(file), embeddings())


def write_again_and_again(folder, started):
    cache = AudioCache(folder)
    while True:
        for seed in range(20):
            cache.write(cache.file(bytes([seed])), embeddings(seed))
            started.set()


def test_a_process_killed_while_it_writes_leaves_whole_files_only(cache):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=write_again_and_again, args=(cache.folder, started), daemon=True)
    process.start()
    assert started.wait(60)
    time.sleep(0.05)
    process.kill()
    process.join()
    found = [cache.read(cache.file(bytes([seed]))) for seed in range(20)]
    assert any(value is not None for value in found)
    assert all(value is None or torch.equal(value, embeddings(seed)) for seed, value in enumerate(found))


def test_a_folder_that_cannot_be_written_is_named(cache):
    cache.folder.write_text("a file in the folder's place")
    with pytest.raises(cli.RunError, match=f"{cache.folder}: .*--audio-cache"):
        cache.write(cache.file(b"a recording"), embeddings())


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


def loaded(model, utterances, workers):
    examples = data.Examples(utterances, model.tokenizer, model.audio_id)
    steps = data.epoch_steps(len(examples), 8, seed=0, epoch=1)
    with load_steps(examples, steps, 3, model.prepare, workers) as prepared:
        return list(prepared)


def test_workers_change_neither_order_nor_content_and_draw_no_random_numbers(new_model, utterances, tmp_path):
    """Embeddings that are known come from disk, the other recordings as features."""
    model = new_model()
    model.keep_audio(tmp_path)
    known = {u.id: heard for u, heard in zip(utterances[:6], model.hear(utterances[:6]))}
    before = torch.get_rng_state()
    alone, helped = (loaded(model, utterances[:12], workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(helped) == 3
    for (count, share), (other_count, other_share) in zip(alone, helped):
        assert count == other_count and len(share) == len(other_share) == 3
        for one, other in zip(share, other_share):
            assert one.utterances == other.utterances
            for name in ("input_ids", "supervised", "targets", "placeholders"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
            for id, recording, same in zip(one.utterances, one.recordings, other.recordings, strict=True):
                if id in known:
                    assert torch.equal(recording.embeddings, known[id]) and torch.equal(same.embeddings, known[id])
                else:
                    assert same.embeddings is None and torch.equal(recording.features, same.features)


def test_a_ctrl_c_that_reaches_a_worker_leaves_the_step_to_be_finished(new_model, utterances):
    content = utterances[0].recording()
    struck = replace(utterances[0], recording=lambda: os.kill(os.getpid(), signal.SIGINT) or content)
    with StopRequest() as stop:
        assert len(loaded(new_model(), [struck] * 4, workers=1)) == 1
    assert stop.name is None


@pytest.mark.parametrize(
    "recording, error, message",
    [
        (partial(files.read_bytes, "gone.wav"), cli.InputError, "^gone.wav cannot be read: [^\n]*$"),
        # the system does so where memory is short
        (lambda: os.kill(os.getpid(), signal.SIGKILL), cli.RunError, "^[^\n]*--workers 0[^\n]*$"),
    ],
)
def test_an_error_in_a_worker_and_its_death_are_one_line_of_the_user(new_model, utterances, recording, error, message):
    with pytest.raises(error, match=message):
        loaded(new_model(), [replace(utterances[0], recording=recording)] * 4, workers=1)


def lose_the_recordings():
    def read(utterance, extractor):
        Path(f"worker-{os.getpid()}").touch()
        raise cli.InputError("gone.wav cannot be read")

    data.log_mel = read


@pytest.mark.slow
def test_a_run_whose_worker_fails_ends_with_its_workers(checkpoint, corpus, tmp_path):
    arguments = ["--model", checkpoint, "--data", corpus, "--workers", 2]
    code, text = Process("train", arguments, tmp_path, prepare=lose_the_recordings).wait()
    assert code == 2 and text.splitlines()[-1] == "train.py: error: gone.wav cannot be read"
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    assert workers and not any(map(psutil.pid_exists, workers))
