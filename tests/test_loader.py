from dataclasses import replace
from functools import partial
import multiprocessing
import os
from pathlib import Path
import signal

import loader
import numpy as np
from processes import Process
import psutil
import pytest
import runtime
import torch

import data
from support import cli, files


@pytest.fixture
def cache(tmp_path):
    return loader.AudioCache(tmp_path / "cache")


def embeddings(seed=0, dtype=torch.float32):
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_to_the_bit(cache, dtype):
    file = cache.file(b"a recording")
    assert cache.read(file) is None
    cache.write(file, embeddings(dtype=dtype))
    found = cache.read(file)
    assert found.dtype == dtype and torch.equal(found, embeddings(dtype=dtype))


def test_recordings_with_other_content_have_other_files_whatever_their_names(cache):
    assert cache.file(b"one") != cache.file(b"two")
    assert cache.file(b"one") == loader.AudioCache(cache.folder).file(b"one")


def test_a_file_that_was_cut_off_anywhere_counts_as_missing_and_is_written_again(cache):
    file = cache.file(b"a recording")
    cache.write(file, embeddings())
    content = file.read_bytes()
    for length in {0, 1, 7, 8, 9, 60, len(content) // 2, len(content) - 1}:
        file.write_bytes(content[:length])
        assert cache.read(file) is None, length
    cache.write(file, embeddings())
    assert torch.equal(cache.read(file), embeddings())


def test_a_file_whose_end_never_reached_the_disk_counts_as_missing(cache):
    """After a loss of power a file can have its whole length, and zeros in the place of its last blocks."""
    file = cache.file(b"a recording")
    cache.write(file, embeddings())
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))
    assert cache.read(file) is None


def write_again_and_again(folder, started):
    cache = loader.AudioCache(folder)
    while True:
        for seed in range(20):
            cache.write(cache.file(bytes([seed])), embeddings(seed))
            started.set()


def test_a_process_killed_while_it_writes_leaves_whole_files_only(cache):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=write_again_and_again, args=(cache.folder, started), daemon=True)
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    found = [cache.read(cache.file(bytes([seed]))) for seed in range(20)]
    assert any(value is not None for value in found)
    assert all(value is None or torch.equal(value, embeddings(seed)) for seed, value in enumerate(found))


def test_a_folder_that_cannot_be_written_is_named(cache):
    cache.folder.write_text("a file in the folder's place")
    with pytest.raises(cli.RunError, match=f"audio embeddings cannot be kept in {cache.folder}: .*--audio-cache"):
        cache.write(cache.file(b"a recording"), embeddings())


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches


def test_positions_point_at_the_token_before_each_supervised_one_and_at_every_placeholder(new_model, examples):
    model = new_model()
    batch = model.prepare(examples[:5])
    flat = batch.input_ids.flatten()
    answers = [token for example in examples[:5] for token in example.answer_ids]
    assert batch.targets.tolist() == answers == flat[batch.supervised + 1].tolist()
    ends = {model.tokenizer.convert_tokens_to_ids("<|assistant|>")}
    starts = np.cumsum([0, *(len(example.answer_ids) for example in examples[:4])])
    assert set(flat[batch.supervised[starts]].tolist()) == ends
    assert len(batch.placeholders) == sum(example.utterance.audio_tokens for example in examples[:5])
    assert set(flat[batch.placeholders].tolist()) == {model.audio_id}
    assert batch.tokens == sum(map(len, examples[:5])) and batch.utterances == [e.utterance.id for e in examples[:5]]


def test_a_supervised_token_at_the_start_of_a_row_is_not_predicted_from_the_row_above():
    first, second = data.Example(None, "APA", [5], [7]), data.Example(None, "APA", [], [8, 9])
    batch = loader.Preparation(None, pad_id=0, audio_id=1).pad([first, second])
    assert batch.supervised.tolist() == [0, 2] and batch.targets.tolist() == [7, 9]


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


def loaded(model, utterances, workers):
    examples = data.Examples(utterances, model.tokenizer, model.audio_id)
    steps = data.epoch_steps(len(examples), 8, seed=0, epoch=1)
    with loader.load_steps(examples, steps, 3, model.prepare, workers) as prepared:
        return list(prepared)


def test_workers_change_neither_order_nor_content_and_draw_no_random_numbers(new_model, utterances):
    model = new_model()
    before = torch.get_rng_state()
    alone, helped = (loaded(model, utterances[:12], workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(helped) == 3
    for (count, share), (other_count, other_share) in zip(alone, helped):
        assert count == other_count and len(share) == len(other_share) == 3
        for one, other in zip(share, other_share):
            assert one.utterances == other.utterances
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.supervised, other.supervised)
            for _, recording, same in zip(one.utterances, one.recordings, other.recordings, strict=True):
                assert torch.equal(recording.features, same.features)


def test_workers_give_embeddings_that_are_known_and_features_of_the_others(new_model, utterances, tmp_path):
    model = new_model()
    model.keep_audio(tmp_path)
    known = model.audio_embeddings(utterances[:6])
    steps = loaded(model, utterances[:12], workers=2)
    assert len(steps) == 3
    for _, share in steps:
        for batch in share:
            for id, recording in zip(batch.utterances, batch.recordings, strict=True):
                place = next(i for i, utterance in enumerate(utterances) if utterance.id == id)
                assert (recording.embeddings is None) == (place >= 6) == (recording.features is not None)
                if place < 6:
                    assert torch.equal(recording.embeddings, known[place])


def test_a_ctrl_c_that_reaches_a_worker_leaves_the_step_to_be_finished(new_model, utterances):
    content = utterances[0].recording()
    struck = replace(utterances[0], recording=lambda: os.kill(os.getpid(), signal.SIGINT) or content)
    with runtime.StopRequest() as stop:
        assert len(loaded(new_model(), [struck] * 4, workers=1)) == 1
    assert stop.name is None


def test_an_error_in_a_worker_is_one_line_of_the_user(new_model, utterances):
    gone = replace(utterances[0], recording=partial(files.read_bytes, "gone.wav"))
    with pytest.raises(cli.InputError) as error:
        loaded(new_model(), [gone] * 4, workers=1)
    assert str(error.value) == "gone.wav cannot be read: No such file or directory"


def test_a_worker_that_is_killed_is_reported_with_a_way_out(new_model, utterances):
    """The system does so where memory is short."""
    struck = replace(utterances[0], recording=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(cli.RunError, match="a worker process failed: .*--workers 0 does without"):
        loaded(new_model(), [struck] * 4, workers=1)


def lose_the_recordings():
    def read(utterance, extractor):
        Path(f"worker-{os.getpid()}").touch()
        raise cli.InputError("recording gone.wav cannot be read")

    data.log_mel = read


def test_a_run_whose_worker_fails_ends_with_its_workers(checkpoint, corpus, tmp_path):
    arguments = ["--model", checkpoint, "--data", corpus, "--workers", 2]
    process = Process("train", arguments, tmp_path, prepare=lose_the_recordings)
    code, text = process.wait()
    assert code == 2 and text.splitlines()[-1] == "train.py: error: recording gone.wav cannot be read"
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    assert workers and not any(map(psutil.pid_exists, workers))
