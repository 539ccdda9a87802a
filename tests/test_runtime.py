"""Runs that are killed, stopped, resumed, and spread over processes."""

from dataclasses import replace
import errno
from functools import partial
import io
import json
import multiprocessing
import os
from pathlib import Path
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT, script
import loader
import numpy as np
from processes import Process, together
import psutil
import pytest
import runtime
from safetensors import SafetensorError
from safetensors.torch import load_file
import soundfile
import torch

import data
import model as models
from support import cli, files
import train

STEPS = 12  # of the runs below: two epochs of six steps
WEIGHTS = Path("epoch-2") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def command(checkpoint, corpus):
    """Arguments of a run of twelve steps, with dropout and a checkpoint after each step."""
    return [
        "--model",
        checkpoint,
        "--data",
        corpus,
        "--limit",
        24,
        "--epochs",
        2,
        "--rank",
        4,
        "--alpha",
        8,
        "--batch-size",
        4,
        "--accumulation",
        2,
        "--learning-rate",
        3e-3,
        "--save-minutes",
        1e-6,
    ]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, text = Process("train", command, folder).wait()
    assert code == 0, text
    return folder / "out"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(run):
    return read(run / "log.jsonl")


def same_weights(one, other, file=WEIGHTS):
    one, other = load_file(one / file), load_file(other / file)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_same_run(run, uninterrupted):
    """Bit-equal weights of both epochs, and every step logged once with the same loss."""
    assert [(line["step"], line["loss"]) for line in log(run)] == [
        (line["step"], line["loss"]) for line in log(uninterrupted)
    ]
    assert same_weights(run, uninterrupted, Path("epoch-1") / WEIGHTS.name) and same_weights(run, uninterrupted)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000011.pt", "step-00000012.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Killed, and resumed


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_save(count, moment):
    """Prepares a run that dies in its count-th checkpoint: half of it written, all written, or just renamed."""
    save, sync, replace, seen = torch.save, files._sync, os.replace, []

    def half(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        seen.append(1)
        if len(seen) < count:
            file.write(buffer.getvalue())
        else:
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
            kill_self()

    def at(function, *arguments):
        function(*arguments)
        if str(arguments[0]).endswith(".pt.unfinished"):
            seen.append(1)
            if len(seen) == count:
                kill_self()

    if moment == "half written":
        torch.save = half
    elif moment == "written":
        files._sync = partial(at, sync)
    else:
        os.replace = partial(at, replace)


# Seven moments anywhere, and three in the middle of a save
MOMENTS = [("running", random.Random(i).randint(0, STEPS - 1)) for i in range(7)]
MOMENTS += [("half written", 8), ("written", 3), ("renamed", 10)]


@pytest.mark.parametrize("moment, step", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_weights_to_the_bit(command, uninterrupted, tmp_path, moment, step):
    prepare = None if moment == "running" else partial(killed_in_save, step, moment)
    run = Process("train", command, tmp_path, prepare=prepare)
    if moment == "running":
        run.wait_for_lines(tmp_path / "out" / "log.jsonl", step)
        time.sleep(random.Random(step).uniform(0, 0.1))  # a step takes about this long
        run.signal(signal.SIGKILL)
    code, text = run.wait()
    assert code == -signal.SIGKILL, text
    left = [path.name for path in (tmp_path / "out").glob("checkpoints/*")]
    code, text = Process("train", [*command, "--resume"], tmp_path).wait()
    assert code == 0 and ("resumed after step" in text) == any(name.endswith(".pt") for name in left), text
    assert_same_run(tmp_path / "out", uninterrupted)
    if moment != "running":
        assert f"resumed after step {step if moment == 'renamed' else step - 1}\n" in text
        assert any(name.endswith(".pt.unfinished") for name in left) == (moment != "renamed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_so_exits_with_0_and_goes_on(command, uninterrupted, tmp_path, number):
    run = Process("train", [*command, "--save-minutes", 60], tmp_path)
    run.wait_for_lines(tmp_path / "out" / "log.jsonl", 3)
    run.signal(number)
    code, text = run.wait()
    assert code == 0 and "Traceback" not in text, text
    assert f"{number.name}: this step is finished and saved first" in text
    stopped = len(log(tmp_path / "out"))
    assert f"stopped after step {stopped}, which is saved: the same command with --resume goes on" in text
    assert f"step-{stopped:08d}.pt" in os.listdir(tmp_path / "out" / "checkpoints") and 3 <= stopped < STEPS
    code, text = Process("train", [*command, "--resume"], tmp_path).wait()
    assert code == 0 and f"resumed after step {stopped}" in text
    assert same_weights(tmp_path / "out", uninterrupted)


def test_with_the_audio_encoder_in_the_graph_a_stopped_run_goes_on_to_the_bit_as_well(command, tmp_path):
    arguments = [*command, "--strategy", "unfreeze"]
    assert Process("train", [*arguments, "--output", "through"], tmp_path).wait()[0] == 0
    run = Process("train", arguments, tmp_path)
    run.wait_for_lines(tmp_path / "out" / "log.jsonl", 7)
    run.signal(signal.SIGTERM)
    assert "stopped after step" in run.wait()[1]
    assert Process("train", [*arguments, "--resume"], tmp_path).wait()[0] == 0
    assert_same_run(tmp_path / "out", tmp_path / "through")
    assert same_weights(tmp_path / "out", tmp_path / "through", Path("epoch-2") / models.TRAINED_FILE)


def two_signals():
    """The first step never ends."""
    train.train_step = lambda *arguments: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and time.sleep(60)


def test_a_second_signal_ends_the_run_at_once(command, tmp_path):
    code, text = Process("train", command, tmp_path, prepare=two_signals).wait()
    assert code == -signal.SIGINT and text.count("once more to stop at once") == 1


def test_a_finished_run_that_is_resumed_stays_as_it_is(command, uninterrupted):
    before = (uninterrupted / WEIGHTS).read_bytes()
    code, text = Process("train", [*command, "--resume"], uninterrupted.parent).wait()
    assert code == 0 and f"resumed after step {STEPS}" in text
    assert (uninterrupted / WEIGHTS).read_bytes() == before and len(log(uninterrupted)) == STEPS


def disk_full_after(limit):
    """No file can grow beyond this many bytes: what a full disk does, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_says_so_and_leaves_the_last_good_checkpoint(command, tmp_path):
    first = Process("train", [*command, "--epochs", 1], tmp_path)
    assert first.wait()[0] == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out" / "checkpoints").iterdir()}
    size = len(next(iter(kept.values())))
    for file in (tmp_path / "out").glob("*.jsonl"):  # as if the run had been killed before its last save
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    (tmp_path / "out" / "checkpoints" / "step-00000006.pt").unlink()
    del kept["step-00000006.pt"]
    again = Process(
        "train", [*command, "--epochs", 1, "--resume"], tmp_path, prepare=partial(disk_full_after, size // 2)
    )
    code, text = again.wait()
    assert code == 1 and "Traceback" not in text, text
    assert "train.py: error: out/checkpoints/step-00000006.pt cannot be written: File too large" in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "checkpoints").iterdir()} == kept


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device"), "I/O error: No space left on device"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file_and_no_temporary_one(tmp_path, error, reason):
    (tmp_path / "file").write_text("old")
    with pytest.raises(cli.RunError, match=f"file cannot be written: .*{reason}"):
        with files.whole(tmp_path / "file") as temporary:
            temporary.write_text("ne")
            raise error
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_failure_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), files.whole(tmp_path / "file") as temporary:
        temporary.touch()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_reason_for_a_full_disk_is_the_systems():
    """torch.save replaces the system's error with one about positions in a file."""
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb", buffering=0) as file:
        runtime._write({"weights": torch.zeros(10_000)}, file)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that cannot be used


@pytest.fixture
def broken(uninterrupted, tmp_path):
    """A copy of a finished run whose newest checkpoint a test may spoil."""
    folder = tmp_path / "out"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("log.jsonl", "checkpoints/step-00000011.pt", "checkpoints/step-00000012.pt"):
        (folder / name).write_bytes((uninterrupted / name).read_bytes())
    return folder / "checkpoints" / "step-00000012.pt"


class Payload:
    """Unpickling this makes a file: a checkpoint from elsewhere could as well do anything else."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "pickle", "torch pickle", "other keys", "a list"])
def test_a_file_that_is_no_checkpoint_is_named_refused_and_the_older_one_offered(broken, tmp_path, content):
    whole = broken.read_bytes()
    payload = Payload(tmp_path / "executed")
    with open(broken, "wb") as file:
        if content == "truncated":
            file.write(whole[: len(whole) * 2 // 3])
        elif content == "text":
            file.write(b"not a checkpoint")
        elif content == "pickle":
            pickle.dump({"step": payload}, file)
        elif content == "torch pickle":
            torch.save(torch.load(io.BytesIO(whole), weights_only=True) | {"settings": payload}, file)
        elif content == "other keys":
            torch.save({"step": 12}, file)
        elif content == "a list":
            torch.save([12], file)
    with pytest.raises(cli.InputError) as error:
        runtime.read_checkpoint(broken)
    assert str(error.value) == (
        f"checkpoint {broken} is cut off, damaged, or not one of train.py; the one before it: "
        f"--resume {broken.parent / 'step-00000011.pt'}"
    )
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "executed").exists()  # what would have happened


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_checkpoint_that_is_no_regular_file_is_refused(broken, make):
    broken.unlink()
    make(broken)
    with pytest.raises(cli.InputError, match=f"checkpoint {broken} is cut off, damaged, or not one"):
        runtime.read_checkpoint(broken)


def first(values):
    return values[min(values)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["weights"].update({min(state["weights"]): "text"}),
        lambda state: first(state["weights"]).fill_(float("nan")),
        lambda state: state["weights"].update({min(state["weights"]): first(state["weights"]).long()}),
        lambda state: state["weights"].update({min(state["weights"]): first(state["weights"])[:1]}),
        lambda state: state["weights"].clear(),
        lambda state: state["optimiser"]["state"].clear(),
        lambda state: state["optimiser"]["state"].update({999: state["optimiser"]["state"][0]}),
        lambda state: state["optimiser"]["state"][0].pop("exp_avg"),
        lambda state: state["optimiser"]["state"][0].update(exp_avg="text"),
        lambda state: state["optimiser"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda state: state["random"].clear(),
        lambda state: state["random"][0].pop("torch"),
        lambda state: state["random"][0].update(python="text"),
        lambda state: state["random"][0].update(torch=torch.zeros(5, dtype=torch.uint8)),
        lambda state: state["random"][0].update(numpy=("MT19937", [1, 2], 1, 0, 0.0)),
        lambda state: state.update(step=STEPS + 1),
    ],
)
def test_a_checkpoint_with_other_things_inside_is_refused_in_one_line(monkeypatch, broken, command, tmp_path, damage):
    state = torch.load(broken, weights_only=True)
    damage(state)
    torch.save(state, broken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, [*command, "--resume"])])
    with pytest.raises(cli.InputError, match="checkpoint") as error:
        train.train(train.parse_settings())
    assert "\n" not in str(error.value)


def test_the_older_checkpoint_that_was_offered_leads_to_the_same_weights(broken, command, uninterrupted):
    broken.write_bytes(broken.read_bytes()[:1000])
    code, text = Process("train", [*command, "--resume"], broken.parents[2]).wait()
    assert code == 2 and "--resume out/checkpoints/step-00000011.pt" in text and "Traceback" not in text
    code, text = Process("train", [*command, "--resume", "out/checkpoints/step-00000011.pt"], broken.parents[2]).wait()
    assert code == 0 and "resumed after step 11" in text
    assert same_weights(broken.parents[1], uninterrupted)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--learning-rate", 1e-3], "is of a run with --learning-rate 0.003, not 0.001"),
        (["--epochs", 3], "is of a run with --epochs 2, not 3"),
        (["--seed", 1, "--rank", 2], "--rank 4, not 2; --seed 0, not 1"),
        (["--limit", 23], "--limit 24, not 23"),
        (["--resume", "elsewhere.pt"], "elsewhere.pt is missing; "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    monkeypatch, broken, command, tmp_path, change, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, [*command, "--resume", *change])])
    with pytest.raises(cli.InputError) as error:
        train.train(train.parse_settings())
    assert message in str(error.value) and not (tmp_path / "out" / "settings.json").exists()


def test_a_checkpoint_of_a_run_on_other_labels_is_refused(broken, utterances):
    state = torch.load(broken, weights_only=True)
    assert train.read_state(broken, state["settings"], data.fingerprint(utterances[:24]), STEPS)["step"] == STEPS
    other = [u if i else replace(u, text="OTHER") for i, u in enumerate(utterances[:24])]
    with pytest.raises(cli.InputError, match="another corpus, or on other labels"):
        train.read_state(broken, state["settings"], data.fingerprint(other), STEPS)


def test_a_moved_corpus_is_the_same_corpus_and_every_label_counts(utterances):
    same = [replace(u, recording=None) for u in utterances]
    assert data.fingerprint(same) == data.fingerprint(utterances)
    first, *rest = utterances
    word = first.words[0]
    changes = [
        {"samples": 1},
        {"speaker": "x"},
        {"scores": first.scores | {"total": 11}},
        {"text": "x"},
        {"id": "x"},
        {"words": (replace(word, heard=("x",)), *first.words[1:])},
        {"words": (replace(word, canonical=("x",)), *first.words[1:])},
    ]
    digests = {data.fingerprint([replace(first, **change), *rest]) for change in changes}
    assert len(digests | {data.fingerprint(utterances), data.fingerprint(rest)}) == len(changes) + 2


def test_random_numbers_go_on_where_they_were():
    state = runtime._random_state()
    draw = lambda: (random.random(), runtime.np.random.rand(), torch.rand(1).item())  # noqa: E731
    expected = draw()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    runtime._set_random_state(torch.load(buffer, weights_only=True))
    assert draw() == expected


def test_the_micro_batch_may_change_between_the_parts_of_a_run(command, uninterrupted, tmp_path):
    run = Process("train", command, tmp_path)
    run.wait_for_lines(tmp_path / "out" / "log.jsonl", 4)
    run.signal(signal.SIGTERM)
    assert run.wait()[0] == 0
    changes = ["--micro-batch", 3, "--gradient-checkpointing", "--save-minutes", 60, "--resume"]
    code, text = Process("train", [*command, *changes], tmp_path).wait()
    assert code == 0 and "computed 3 at a time" in text
    losses = [[line["loss"] for line in log(run)] for run in (uninterrupted, tmp_path / "out")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # dropout falls on other positions


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def finish(processes):
    for process in processes:
        code, text = process.wait()
        assert code == 0, text
    return processes


def deviation(one, other, file=WEIGHTS):
    """The largest relative difference of a weight.

    But for the audio encoder's key biases: they shift all attention scores of a query alike, so their gradient is zero,
    and Adam makes steps of its rounding.
    """
    one, other = ({k: v for k, v in load_file(run / file).items() if "k_proj.bias" not in k} for run in (one, other))
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).norm() / one[key].norm().clamp_min(1e-12)).item() for key in one)


@pytest.mark.parametrize("strategy", ["lora", "unfreeze"])
def test_two_processes_give_the_losses_and_weights_of_one(command, tmp_path, strategy):
    arguments = [*command, "--dropout", 0, "--strategy", strategy, "--epsilon", 1e-4, "--save-minutes", 60]
    finish([Process("train", [*arguments, "--output", "one"], tmp_path)])
    first, second = finish(together("train", [*arguments, "--output", "two"], tmp_path))
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "tokens", "supervised_tokens", "learning_rate"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), key
    assert deviation(tmp_path / "one", tmp_path / "two") < 1e-5
    if strategy == "unfreeze":
        assert deviation(tmp_path / "one", tmp_path / "two", Path("epoch-2") / models.TRAINED_FILE) < 1e-5
    assert "computed 4 at a time in each of 2 processes" in first.text()
    assert "corpus:" not in second.text() and "step/s" not in second.text()


def test_gradients_go_between_processes_once_a_step(monkeypatch):
    calls = []

    class Wrapper(train.DistributedDataParallel):
        def __init__(self):
            pass

        def no_sync(self):
            calls.append("no_sync")
            return train.nullcontext()

    for i in range(3):
        with train.synchronised(Wrapper.__new__(Wrapper), last=i == 2):
            calls.append("backward")
    assert calls == ["no_sync", "backward", "no_sync", "backward", "backward"]


def test_two_killed_processes_go_on_to_the_same_weights_to_the_bit(command, tmp_path):
    finish(together("train", [*command, "--output", "through"], tmp_path))
    killed = together("train", command, tmp_path)
    killed[0].wait_for_lines(tmp_path / "out" / "log.jsonl", 5)
    for process in killed:
        process.signal(signal.SIGKILL)
    assert [process.wait()[0] for process in killed] == [-signal.SIGKILL] * 2
    first, _ = finish(together("train", [*command, "--resume"], tmp_path))
    assert "resumed after step" in first.text()
    assert_same_run(tmp_path / "out", tmp_path / "through")


def test_a_run_of_two_processes_may_go_on_in_one(command, tmp_path):
    arguments = [*command, "--dropout", 0, "--epsilon", 1e-4]
    finish([Process("train", [*arguments, "--output", "one"], tmp_path)])
    both = together("train", arguments, tmp_path)
    both[0].wait_for_lines(tmp_path / "out" / "log.jsonl", 4)
    both[0].signal(signal.SIGTERM)
    finish(both)
    (alone,) = finish([Process("train", [*arguments, "--resume"], tmp_path)])
    assert "saved by 2 processes, now 1: dropout will be another" in alone.text()
    assert deviation(tmp_path / "one", tmp_path / "out") < 1e-5


def note_steps():
    """Write down the number of each step that this process takes."""
    step = train.train_step

    def noted(*arguments):
        with open(f"steps-{os.environ['RANK']}.txt", "a") as file:
            print(arguments[5], file=file)
        return step(*arguments)

    train.train_step = noted


def test_a_signal_to_one_process_stops_both_at_the_same_step(command, tmp_path):
    both = together("train", command, tmp_path, prepare=note_steps)
    both[1].wait_for_lines(tmp_path / "out" / "log.jsonl", 3)
    both[1].signal(signal.SIGTERM)
    first, _ = finish(both)
    taken = [(tmp_path / f"steps-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert taken[0] == taken[1] and len(taken[0]) < STEPS
    assert f"stopped after step {len(taken[0])}, " in first.text()


def test_sharding_full_gives_the_losses_and_weights_of_one_process_and_resumes_to_the_bit(checkpoint, corpus, tmp_path):
    sizes = ["--limit", 12, "--epochs", 2, "--batch-size", 4, "--accumulation", 2, "--learning-rate", 1e-3]
    arguments = ["--model", checkpoint, "--data", corpus, "--strategy", "full", "--epsilon", 1e-4, *sizes]
    finish([Process("train", [*arguments, "--output", "one"], tmp_path)])
    both = together("train", [*arguments, "--shard"], tmp_path)
    both[0].wait_for_lines(tmp_path / "out" / "log.jsonl", 2)
    both[0].signal(signal.SIGTERM)
    assert "stopped after step" in finish(both)[0].text()
    finish(together("train", [*arguments, "--shard", "--resume"], tmp_path))
    finish(together("train", [*arguments, "--shard", "--output", "through"], tmp_path))
    one, two = log(tmp_path / "one"), log(tmp_path / "out")
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), key
    file = Path("epoch-2") / models.TRAINED_FILE
    assert deviation(tmp_path / "one", tmp_path / "out", file) < 1e-5
    assert same_weights(tmp_path / "out", tmp_path / "through", file)


def no_answers():
    models.SpeechModel.generate = None


def test_sharded_processes_validate_by_loss_alone_and_never_wait_for_a_long_recording(checkpoint, corpus, tmp_path):
    """One process has a recording above 40 s in a micro-batch, the other has none."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    for recording in sorted((folder / "WAVE").rglob("*.WAV"))[1:13:10]:  # of both speakers
        soundfile.write(recording, np.resize(soundfile.read(recording)[0], 41 * data.SAMPLE_RATE), data.SAMPLE_RATE)
    sizes = ["--limit", 13, "--epochs", 1, "--batch-size", 4, "--accumulation", 1, "--validation", 0.5]
    arguments = ["--model", checkpoint, "--data", folder, "--strategy", "full", *sizes]
    one = Process("train", [*arguments, "--output", "one"], tmp_path)
    assert one.wait()[0] == 0
    first, _ = finish(together("train", [*arguments, "--shard"], tmp_path, prepare=no_answers))
    (line,), (expected,) = (read(tmp_path / name / "validation.jsonl") for name in ("out", "one"))
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert line.keys() == {"epoch", "best", "step", "loss"} and "on held-out speakers: loss" in first.text()


def test_torchrun_trains_and_evaluates_as_one_process_does(command, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    trained = script(*torchrun, ROOT / "train.py", *command, "--epochs", 1, "--validation", 0.5, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("corpus:") == 1 and "on held-out speakers: loss" in trained.stdout
    arguments = ["--adapter", "out", "--limit", 7, "--batch-size", 2, "--max-new-tokens", 30]
    both = script(*torchrun, ROOT / "evaluate.py", *arguments, "--output", "two", cwd=tmp_path)
    assert both.returncode == 0 and both.stdout.count("\nTable 3") == 1, both.stderr
    assert Process("evaluate", [*arguments, "--output", "one"], tmp_path).wait()[0] == 0
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def fails_on_rank_1():
    def forward(model, batch):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.loss(batch, model.embed(batch.recordings))

    models.SpeechModel.forward = forward


def test_when_one_process_fails_its_error_is_said_and_none_goes_on(command, tmp_path):
    first, second = together("train", command, tmp_path, prepare=fails_on_rank_1)
    code, text = second.wait()
    assert code == 1 and "train.py (rank 1): error: out of memory with micro-batches of 4" in text
    assert first.wait()[0] != 0 and log(tmp_path / "out") == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "corpus folder nowhere does not exist"),
        (["--shard"], "--shard is for --strategy full"),
    ],
)
def test_a_mistake_that_all_processes_see_is_said_once(command, tmp_path, arguments, message):
    first, second = together("train", [*command, *arguments], tmp_path)
    code, text = first.wait()
    time.sleep(1)
    second.signal(signal.SIGTERM)  # as torchrun does, well before cli.RANK_0_FIRST is over
    assert code == 2 and text.startswith(f"train.py: error: {message}") and len(text.splitlines()) == 1
    assert second.wait() == (-signal.SIGTERM, "")


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes of a whole run


def count_children():
    """Write down how many child processes live at each step."""
    step = train.train_step

    def counted(*arguments):
        with open("children.txt", "a") as file:
            print(len(multiprocessing.active_children()), file=file)
        return step(*arguments)

    train.train_step = counted


def test_workers_end_with_their_epoch(command, tmp_path):
    arguments = [*command, "--limit", 8, "--epochs", 5, "--workers", 2, "--save-minutes", 60]
    code, text = Process("train", arguments, tmp_path, prepare=count_children).wait()
    assert code == 0, text
    assert set((tmp_path / "children.txt").read_text().split()) == {"2"}


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_steps_of_many_tensors_need_no_file_descriptors(command, tmp_path):
    sizes = ["--limit", 40, "--batch-size", 16, "--accumulation", 5, "--micro-batch", 1, "--epochs", 2]
    arguments = [*command, *sizes, "--workers", 2, "--save-minutes", 60]
    code, text = Process("train", arguments, tmp_path, prepare=few_descriptors).wait()
    assert code == 0, text


def never_a_step():
    loader.SILENCE = 2
    loader.Steps.__getitem__ = lambda steps, number: time.sleep(300)


def test_workers_that_say_nothing_end_the_run(command, tmp_path):
    code, text = Process("train", [*command, "--workers", 1], tmp_path, prepare=never_a_step).wait()
    assert code == 1 and "timed out" in text.splitlines()[-1] and "--workers 0" in text.splitlines()[-1]


def test_the_processes_of_a_killed_torchrun_end(command, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
    with open(tmp_path / "output.txt", "w") as output:
        launcher = subprocess.Popen(
            [*torchrun, *map(str, command), "--epochs", "999"], cwd=tmp_path, stdout=output, stderr=output
        )
    log, deadline = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    assert len(workers) == 2, (tmp_path / "output.txt").read_text()
    assert psutil.wait_procs(workers, timeout=20)[1] == []


# ----------------------------------------------------------------------------------------------------------------------
# Files of others, and two runs into one folder


def test_of_two_runs_into_one_folder_one_is_refused_and_the_other_is_whole(command, uninterrupted, tmp_path):
    both = [Process("train", command, tmp_path) for _ in range(2)]
    (_, done), (code, refused) = sorted((process.wait() for process in both), key=lambda end: end[0])
    assert code == 2 and "out is in use by process" in refused.splitlines()[-1] and "Traceback" not in refused
    assert "adapters in out/epoch-*" in done
    assert_same_run(tmp_path / "out", uninterrupted)


def test_a_killed_run_holds_no_lock_even_where_its_workers_live_on(tmp_path):
    def hold():
        with files.lock(tmp_path, "train", "--output"):
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,)).start()
            (tmp_path / "locked").touch()
            time.sleep(30)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(cli.InputError, match=f"in use by process {holder.pid} on .*--output"):
        with files.lock(tmp_path, "train", "--output"):
            raise AssertionError("locked twice")
    left = psutil.Process(holder.pid).children()
    holder.kill()
    holder.join()
    with files.lock(tmp_path, "train", "--output"):
        assert len(left) == 1 and left[0].is_running()
    left[0].kill()


def test_where_the_file_system_has_no_locks_a_run_goes_on_and_says_so(monkeypatch, tmp_path, capsys):
    def lockf(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with files.lock(tmp_path, "train", "--output"):
        assert f"{tmp_path} cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_what_a_killed_save_left_is_cleared_away_and_nothing_else(command, tmp_path):
    checkpoints = tmp_path / "out" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000003.pt.unfinished").write_bytes(b"half of it")
    (tmp_path / "out" / "epoch-1.unfinished").mkdir()
    for name in ("notes.txt", "backup.tmp"):
        (tmp_path / "out" / name).write_text("mine")
    assert Process("train", [*command, "--epochs", 1, "--resume"], tmp_path).wait()[0] == 0
    assert [path.suffix for path in checkpoints.iterdir()] == [".pt"] * 2
    assert not (tmp_path / "out" / "epoch-1.unfinished").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == (tmp_path / "out" / "backup.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["settings.json", "log.jsonl", "validation.jsonl", "curves.png", "epoch-1", "checkpoints/step-00000001.pt"]
)
def test_a_file_that_a_run_would_overwrite_is_named_and_left(monkeypatch, command, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, command), "--output", str(tmp_path / "out")])
    with pytest.raises(cli.InputError, match=f"{path} is there already: .*another --output"):
        train.train(train.parse_settings())
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.jsonl", "curves.png", "epoch-1/mine"])
def test_a_folder_that_is_not_of_a_run_is_not_resumed(monkeypatch, command, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, command), "--output", str(tmp_path / "out"), "--resume"])
    with pytest.raises(cli.InputError, match="out/settings.json cannot be read: No such file"):
        train.train(train.parse_settings())
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / ".train.lock")
    with pytest.raises(cli.InputError, match="train.lock is not a regular file: remove it, or choose another --output"):
        with files.lock(tmp_path, "train", "--output"):
            raise AssertionError("locked")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("settings.json", "[]", "settings.json"),
        ("settings.json", '{"theme": "dark"}', "settings.json: strategy is missing"),
        ("settings.json", '{"strategy": 1, "speech_adapter": "merge", "epochs": 1, "seed": 0}', "strategy 1: "),
        ("log.jsonl", '{"step": "one"}\n', "line 1 of .*log.jsonl: step 'one'"),
        ("log.jsonl", "\ufffd\n{}\n", "line 1 of .*log.jsonl"),
        ("log.jsonl", b"\xff\xfe\n", "log.jsonl is not UTF-8 text"),
        ("log.jsonl", "[" * 100_000 + "\n", "line 1 of .*log.jsonl: .*recursion"),
        ("validation.jsonl", '{"epoch": 1, "best": "yes", "step": 1, "loss": 1.0}\n', "validation.jsonl: best 'yes'"),
        (
            "log.jsonl",
            '{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n' * 2,
            "log.jsonl has step 1 behind .*, or twice",
        ),
        ("validation.jsonl", '{"epoch": 1, "best": true, "step": 1, "loss": NaN}\n', "validation.jsonl: loss nan"),
        ("validation.jsonl", '{"epoch": 1, "best": true, "step": 1, "loss": 1.0, "per": "x"}\n', "jsonl: per 'x'"),
        ("validation.jsonl", '{"epoch": 1, "best": true, "step": 1, "loss": 1.0}\n' * 2, "jsonl has an epoch twice"),
    ],
)
def test_a_broken_file_of_a_run_that_is_resumed_is_named_with_field_and_value(
    monkeypatch, broken, command, tmp_path, name, content, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, [*command, "--resume"])])
    with pytest.raises(cli.InputError, match=message) as error:
        train.train(train.parse_settings())
    assert "\n" not in str(error.value)


def test_a_last_line_that_was_cut_off_is_written_again(broken, command, uninterrupted):
    path = broken.parents[1] / "log.jsonl"
    *lines, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + last[: len(last) // 2])
    broken.unlink()  # so the last step is done again
    assert Process("train", [*command, "--resume"], broken.parents[2]).wait()[0] == 0
    assert [line["loss"] for line in log(broken.parents[1])] == [line["loss"] for line in log(uninterrupted)]


def equal(one, other):
    """Equality of what a checkpoint holds."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_changes_nothing(broken):
    content, whole = broken.read_bytes(), torch.load(broken, weights_only=True)
    draw, found = random.Random(0), 0
    for _ in range(150):
        place = draw.randrange(8 * len(content))
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        broken.write_bytes(spoilt)
        try:
            state = runtime.read_checkpoint(broken)
        except cli.InputError as error:
            assert f"--resume {broken.parent / 'step-00000011.pt'}" in str(error)
            found += 1
        else:
            assert equal(state, whole), place
    assert found > 100
