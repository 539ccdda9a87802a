"""Runs that are killed, stopped, resumed, and spread over processes."""

from functools import partial
import io
import multiprocessing
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT, read_lines, script
import numpy as np
from processes import Process, free_ports, together
import psutil
import pytest
from safetensors.torch import load_file
import soundfile
import torch
from torch.nn.parallel import DistributedDataParallel

import data
import model as models
from support import files, sharding, workers
import train

pytestmark = pytest.mark.slow
STEPS = 12  # of the runs below: two epochs of six steps
SIZES = "--limit 24 --epochs 2 --rank 4 --alpha 8 --batch-size 4 --accumulation 2 --learning-rate 3e-3".split()
WEIGHTS = Path("epoch-2") / models.ADAPTER_FILE
TRAINED = Path("epoch-2") / models.TRAINED_FILE
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def command(where):
    """Arguments of a run of twelve steps, with dropout and a checkpoint after each step."""
    return [*where, *SIZES, "--save-minutes", 1e-6]


def finish(*runs):
    """What the first of these processes printed; all of them must end well."""
    ends = [run.wait() for run in runs]
    for code, text in ends:
        assert code == 0, text
    return ends[0][1]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(Process("train", command, folder))
    return folder / "out"


def log(run):
    return read_lines(run / "log.jsonl")


def same_weights(one, other, file=WEIGHTS):
    one, other = load_file(one / file), load_file(other / file)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_same_run(run, uninterrupted):
    """Bit-equal weights of both epochs, and every step logged once with the same loss."""
    (steps, expected) = ([(line["step"], line["loss"]) for line in log(folder)] for folder in (run, uninterrupted))
    assert steps == expected
    assert same_weights(run, uninterrupted, Path("epoch-1") / WEIGHTS.name) and same_weights(run, uninterrupted)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000011.pt", "step-00000012.pt"]


def struck(run, out, number, steps):
    """A run that is sent a signal once it has logged so many steps, until its end: (exit code, text)."""
    run.wait_for_lines(out / "log.jsonl", steps)
    run.signal(number)
    return run.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Killed or stopped, and resumed


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_save(count, moment):
    """Prepares a run that dies in its count-th checkpoint: half of it written, all written, or just renamed."""
    save, sync, replace, seen = torch.save, files._sync, os.replace, []

    def half(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        seen.append(1)
        whole = buffer.getvalue()
        file.write(whole if len(seen) < count else whole[: len(whole) // 2])
        if len(seen) == count:
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


# Some moments anywhere, and three in the middle of a save
MOMENTS = [("running", random.Random(i).randint(0, STEPS - 1)) for i in range(4)]
MOMENTS += [("half written", 8), ("written", 3), ("renamed", 10)]


@pytest.mark.parametrize("moment, step", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_weights_to_the_bit(command, uninterrupted, tmp_path, moment, step):
    run = Process("train", command, tmp_path, prepare=moment != "running" and partial(killed_in_save, step, moment))
    if moment == "running":
        run.wait_for_lines(tmp_path / "out" / "log.jsonl", step)
        time.sleep(random.Random(step).uniform(0, 0.1))  # a step takes about this long
        run.signal(signal.SIGKILL)
    code, text = run.wait()
    assert code == -signal.SIGKILL, text
    left = [path.name for path in (tmp_path / "out").glob("checkpoints/*")]
    text = finish(Process("train", [*command, "--resume"], tmp_path))
    assert ("resumed after step" in text) == any(name.endswith(".pt") for name in left)
    assert_same_run(tmp_path / "out", uninterrupted)
    if moment != "running":
        assert f"resumed after step {step if moment == 'renamed' else step - 1}\n" in text
        assert any(name.endswith(".pt.unfinished") for name in left) == (moment != "renamed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_so_exits_with_0_and_goes_on(command, uninterrupted, tmp_path, number):
    code, text = struck(Process("train", [*command, "--save-minutes", 60], tmp_path), tmp_path / "out", number, 3)
    stopped = len(log(tmp_path / "out"))
    assert code == 0 and "Traceback" not in text and number.name in text, text
    assert f"stopped after step {stopped}, " in text and "--resume" in text and 3 <= stopped < STEPS
    assert f"step-{stopped:08d}.pt" in os.listdir(tmp_path / "out" / "checkpoints")
    assert f"resumed after step {stopped}" in finish(Process("train", [*command, "--resume"], tmp_path))
    assert same_weights(tmp_path / "out", uninterrupted)


def test_with_the_audio_encoder_in_the_graph_a_stopped_run_goes_on_to_the_bit_as_well(command, tmp_path):
    arguments = [*command, "--strategy", "unfreeze"]
    finish(Process("train", [*arguments, "--output", "through"], tmp_path))
    assert "stopped after" in struck(Process("train", arguments, tmp_path), tmp_path / "out", signal.SIGTERM, 7)[1]
    finish(Process("train", [*arguments, "--resume"], tmp_path))
    assert_same_run(tmp_path / "out", tmp_path / "through")
    assert same_weights(tmp_path / "out", tmp_path / "through", TRAINED)


def two_signals():
    """The first step never ends."""
    train.train_step = lambda *arguments: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and time.sleep(60)


def test_a_second_signal_ends_the_run_at_once(command, tmp_path):
    code, text = Process("train", command, tmp_path, prepare=two_signals).wait()
    assert code == -signal.SIGINT and text.count("once more") == 1


def test_a_finished_run_stays_as_it_is_resumed_or_not(command, uninterrupted):
    before = (uninterrupted / WEIGHTS).read_bytes()
    assert f"resumed after step {STEPS}" in finish(Process("train", [*command, "--resume"], uninterrupted.parent))
    code, text = Process("train", command, uninterrupted.parent).wait()
    assert code == 2 and "out/settings.json is there already: --resume" in text
    assert (uninterrupted / WEIGHTS).read_bytes() == before and len(log(uninterrupted)) == STEPS


def disk_full_after(limit):
    """No file can grow beyond this many bytes: what a full disk does, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_says_so_and_leaves_the_last_good_checkpoint(command, uninterrupted, tmp_path):
    checkpoints = shutil.copytree(uninterrupted, tmp_path / "out") / "checkpoints"
    for file in (tmp_path / "out").glob("*.jsonl"):  # as if the run had been killed before its last save
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:11]))
    (checkpoints / "step-00000012.pt").unlink()
    ((name, content),) = ((path.name, path.read_bytes()) for path in checkpoints.iterdir())
    full = partial(disk_full_after, len(content) // 2)
    code, text = Process("train", [*command, "--resume"], tmp_path, prepare=full).wait()
    assert code == 1 and "Traceback" not in text, text
    assert "error: out/checkpoints/step-00000012.pt cannot be written: File too large" in text
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == {name: content}


def test_the_older_checkpoint_that_is_offered_leads_to_the_same_weights(command, uninterrupted, tmp_path):
    newest = shutil.copytree(uninterrupted, tmp_path / "out") / "checkpoints" / "step-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    code, text = Process("train", [*command, "--resume"], tmp_path).wait()
    offered = ["--resume", "--checkpoint", "out/checkpoints/step-00000011.pt"]
    assert code == 2 and " ".join(offered) in text and "Traceback" not in text
    assert "resumed after step 11" in finish(Process("train", [*command, *offered], tmp_path))
    assert same_weights(tmp_path / "out", uninterrupted)


def test_the_micro_batch_may_change_between_the_parts_of_a_run(command, uninterrupted, tmp_path):
    assert struck(Process("train", command, tmp_path), tmp_path / "out", signal.SIGTERM, 4)[0] == 0
    changes = "--micro-batch 3 --gradient-checkpointing --save-minutes 60 --resume".split()
    assert "computed 3 at a time" in finish(Process("train", [*command, *changes], tmp_path))
    losses = [[line["loss"] for line in log(run)] for run in (uninterrupted, tmp_path / "out")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # dropout falls on other positions


def test_of_two_runs_into_one_folder_one_is_refused_and_the_other_is_whole(command, uninterrupted, tmp_path):
    both = [Process("train", command, tmp_path) for _ in range(2)]
    (_, done), (code, refused) = sorted((process.wait() for process in both), key=lambda end: end[0])
    late = "settings.json is there already"  # where the machine is so busy that the other one has ended
    assert code == 2 and "Traceback" not in refused
    assert any(reason in refused.splitlines()[-1] for reason in ("out is in use by process", late))
    assert "adapters in out/epoch-*" in done
    assert_same_run(tmp_path / "out", uninterrupted)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def assert_near(one, other, file=WEIGHTS, keys=("loss", "gradient_norm")):
    """The same steps and weights but for rounding.

    The audio encoder's key biases are left out: they shift all attention scores of a query alike, so their gradient is
    zero, and Adam makes steps of its rounding.
    """
    for key in keys:
        assert [line[key] for line in log(other)] == pytest.approx([line[key] for line in log(one)], rel=1e-5), key
    one, other = ({k: v for k, v in load_file(run / file).items() if "k_proj.bias" not in k} for run in (one, other))
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).norm() <= 1e-5 * one[key].norm(), key


@pytest.mark.parametrize("strategy", ["lora", "unfreeze"])
def test_two_processes_give_the_losses_and_weights_of_one(command, tmp_path, strategy):
    arguments = [*command, "--dropout", 0, "--strategy", strategy, "--epsilon", 1e-4, "--save-minutes", 60]
    finish(Process("train", [*arguments, "--output", "one"], tmp_path))
    first, second = together("train", [*arguments, "--output", "two"], tmp_path)
    assert "computed 4 at a time in each of 2 processes" in finish(first, second)
    assert "corpus:" not in second.text() and "step/s" not in second.text()
    one, two = tmp_path / "one", tmp_path / "two"
    assert_near(one, two, keys=("step", "loss", "gradient_norm", "tokens", "supervised_tokens", "learning_rate"))
    if strategy == "unfreeze":
        assert_near(one, two, TRAINED)


def test_gradients_go_between_processes_once_a_step():
    calls = []

    class Wrapper(DistributedDataParallel):
        def __init__(self):
            pass

        def no_sync(self):
            calls.append("no_sync")
            return sharding.nullcontext()

    for i in range(3):
        with sharding.synchronised(Wrapper.__new__(Wrapper), last=i == 2):
            calls.append("backward")
    assert calls == ["no_sync", "backward", "no_sync", "backward", "backward"]


def test_two_killed_processes_go_on_to_the_same_weights_to_the_bit(command, tmp_path):
    finish(*together("train", [*command, "--output", "through"], tmp_path))
    killed = together("train", command, tmp_path)
    killed[0].wait_for_lines(tmp_path / "out" / "log.jsonl", 5)
    for process in killed:
        process.signal(signal.SIGKILL)
    assert [process.wait()[0] for process in killed] == [-signal.SIGKILL] * 2
    assert "resumed after step" in finish(*together("train", [*command, "--resume"], tmp_path))
    assert_same_run(tmp_path / "out", tmp_path / "through")


def note_steps():
    """Write down the number of each step that this process takes."""
    step = train.train_step

    def noted(*arguments):
        with open(f"steps-{os.environ['RANK']}.txt", "a") as file:
            print(arguments[-1], file=file)
        return step(*arguments)

    train.train_step = noted


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_may_go_on_in_one(command, tmp_path):
    arguments = [*command, "--dropout", 0, "--epsilon", 1e-4]
    finish(Process("train", [*arguments, "--output", "one"], tmp_path))
    both = together("train", arguments, tmp_path, prepare=note_steps)
    both[1].wait_for_lines(tmp_path / "out" / "log.jsonl", 3)
    both[1].signal(signal.SIGTERM)
    text = finish(*both)
    taken = [(tmp_path / f"steps-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert taken[0] == taken[1] and len(taken[0]) < STEPS and f"stopped after step {len(taken[0])}, " in text
    alone = finish(Process("train", [*arguments, "--resume"], tmp_path))
    assert "saved by 2 processes, now 1" in alone
    assert_near(tmp_path / "one", tmp_path / "out")


def test_sharding_full_gives_the_losses_and_weights_of_one_process_and_resumes_to_the_bit(where, tmp_path):
    sizes = "--limit 12 --epochs 2 --batch-size 4 --accumulation 2 --learning-rate 1e-3 --epsilon 1e-4".split()
    arguments = [*where, "--strategy", "full", *sizes]
    finish(Process("train", [*arguments, "--output", "one"], tmp_path))
    both = together("train", [*arguments, "--shard"], tmp_path)
    both[0].wait_for_lines(tmp_path / "out" / "log.jsonl", 2)
    both[0].signal(signal.SIGTERM)
    assert "stopped after step" in finish(*both)
    finish(*together("train", [*arguments, "--shard", "--resume"], tmp_path))
    finish(*together("train", [*arguments, "--shard", "--output", "through"], tmp_path))
    assert_near(tmp_path / "one", tmp_path / "out", TRAINED)
    assert same_weights(tmp_path / "out", tmp_path / "through", TRAINED)


def no_answers():
    models.SpeechModel.generate = None


def test_sharded_processes_validate_by_loss_alone_and_never_wait_for_a_long_recording(where, corpus, tmp_path):
    """One process has a recording above 40 s in a micro-batch, the other has none."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    for recording in sorted((folder / "WAVE").rglob("*.WAV"))[1:13:10]:  # of both speakers
        soundfile.write(recording, np.resize(soundfile.read(recording)[0], 41 * data.SAMPLE_RATE), data.SAMPLE_RATE)
    sizes = "--strategy full --limit 13 --epochs 1 --batch-size 4 --accumulation 1 --validation 0.5".split()
    arguments = [*where, "--data", folder, *sizes]
    finish(Process("train", [*arguments, "--output", "one"], tmp_path))
    text = finish(*together("train", [*arguments, "--shard"], tmp_path, prepare=no_answers))
    (line,), (expected,) = (read_lines(tmp_path / name / "validation.jsonl") for name in ("out", "one"))
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert line.keys() == {"epoch", "best", "step", "loss"} and "on held-out speakers: loss" in text


def test_torchrun_trains_and_evaluates_as_one_process_does(command, tmp_path):
    trained = script(*TORCHRUN, ROOT / "train.py", *command, "--epochs", 1, "--validation", 0.5, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("corpus:") == 1 and "on held-out speakers: loss" in trained.stdout
    arguments = "--adapter out --limit 7 --batch-size 2 --max-new-tokens 30".split()
    both = script(*TORCHRUN, ROOT / "evaluate.py", *arguments, "--output", "two", cwd=tmp_path)
    assert both.returncode == 0 and both.stdout.count("\nTable 3") == 1, both.stderr
    finish(Process("evaluate", [*arguments, "--output", "one"], tmp_path))
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


SLOW_THREADS = """
import os, sys
from support import cli, processes

def main():
    processes.start()
    import torch.distributed.fsdp  # imported after the start, as by generating: its default arguments keep the group
    processor = {sorted(os.sched_getaffinity(0))[-cli.process_rank()]}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, processor)
        if open(f"/proc/self/task/{thread}/comm").read() == "pt_gloo_runloop\\n":
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))  # runs when nothing else does
    processes.gather("the last thing that is said")
    processes.end()

for port in sys.argv[1:]:
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for rank in "01":
        if not os.fork():
            os.environ["RANK"] = rank
            sys.exit(cli.run_script("slow.py", main))
    print(*(os.waitpid(-1, 0)[1] for rank in "01"), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the priority of a thread")
def test_a_thread_that_gives_back_a_tensor_while_python_ends_does_not_abort_a_run_that_was_well(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_THREADS)
    ended = script(tmp_path / "slow.py", *free_ports(5), cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert ended.stdout == 5 * "0 0\n", ended.stderr


def fails_on_rank_1():
    forward = models.SpeechModel.forward

    def failing(model, batch):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    models.SpeechModel.forward = failing


def test_when_one_process_fails_its_error_is_said_and_none_goes_on(command, tmp_path):
    first, second = together("train", command, tmp_path, prepare=fails_on_rank_1)
    code, text = second.wait()
    assert code == 1 and "train.py (rank 1): error: out of memory with micro-batches of 4" in text
    assert first.wait()[0] != 0 and log(tmp_path / "out") == []


@pytest.mark.parametrize(
    "arguments, message", [(["--data", "nowhere"], "corpus folder nowhere"), (["--shard"], "--shard is for")]
)
def test_a_mistake_that_all_processes_see_is_said_once(command, tmp_path, arguments, message):
    first, second = together("train", [*command, *arguments], tmp_path)
    code, text = first.wait()
    time.sleep(1)
    second.signal(signal.SIGTERM)  # as torchrun does, well before cli.RANK_0_FIRST is over
    assert code == 2 and text.startswith(f"train.py: error: {message}") and len(text.splitlines()) == 1
    assert second.wait() == (-signal.SIGTERM, "")


def test_the_processes_of_a_killed_torchrun_end(command, tmp_path):
    training = [sys.executable, *TORCHRUN, ROOT / "train.py", *command, "--epochs", "999"]
    with open(tmp_path / "output.txt", "w") as output:
        launcher = subprocess.Popen([*map(str, training)], cwd=tmp_path, stdout=output, stderr=output)
    log, deadline = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    assert len(started) == 2, (tmp_path / "output.txt").read_text()
    assert psutil.wait_procs(started, timeout=20)[1] == []


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


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    count_children()


def test_workers_end_with_their_epoch_and_steps_of_many_tensors_need_no_file_descriptors(command, tmp_path):
    sizes = "--limit 40 --batch-size 16 --accumulation 5 --micro-batch 1 --epochs 3 --workers 2".split()
    finish(Process("train", [*command, *sizes, "--save-minutes", 60], tmp_path, prepare=few_descriptors))
    assert (tmp_path / "children.txt").read_text().split() == ["2"] * 3


def never_a_step():
    workers.SILENCE = 2
    workers.Steps.__getitem__ = lambda steps, number: time.sleep(300)


def test_workers_that_say_nothing_end_the_run(command, tmp_path):
    code, text = Process("train", [*command, "--workers", 1], tmp_path, prepare=never_a_step).wait()
    assert code == 1 and "timed out" in text.splitlines()[-1] and "--workers 0" in text.splitlines()[-1]
