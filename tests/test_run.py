"""Runs that are killed, stopped, resumed, and spread over processes; their checkpoints, logs and folders."""

from dataclasses import replace
from functools import partial
import json
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

from conftest import ROOT, TRAINED, Payload, read_lines, script, settings
import numpy as np
from processes import Process, together
import psutil
import pytest
from records import write
from safetensors.torch import load_file
import torch

import data
import model as models
import prompts
from support import cli, files, pretrained
from support import run as runs
import train

SLOW = pytest.mark.slow
STEPS = 12  # of the runs below: two epochs of six steps
SIZES = "--limit 24 --epochs 2 --rank 4 --alpha 8 --batch-size 4 --accumulation 2 --learning-rate 3e-3".split()
WEIGHTS = (pretrained.ADAPTER_FILE, models.TRAINED_FILE)
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def command(where):
    """Arguments of a run of twelve steps, with dropout and a checkpoint after each step."""
    return [*where, *SIZES, "--save-minutes", 1e-6]


def finish(*running):
    """What the first of these processes printed; all of them must end well."""
    ends = [run.wait() for run in running]
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


def trained(run):
    """{name: tensor} of all that both epochs hold."""
    found = [run / f"epoch-{epoch}" / name for epoch in (1, 2) for name in WEIGHTS]
    return {f"{file} {key}"[len(str(run)) :]: w for file in found for key, w in load_file(file).items()}


def assert_same_run(run, uninterrupted):
    """Bit-equal weights of both epochs, every step logged once with the same loss, and nothing left behind."""
    assert [(s["step"], s["loss"]) for s in log(run)] == [(s["step"], s["loss"]) for s in log(uninterrupted)]
    one, other = trained(run), trained(uninterrupted)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in run.iterdir()} == {path.name for path in uninterrupted.iterdir()}


def struck(run, out, number, steps):
    """A run that is sent a signal once it has logged so many steps, until its end: (exit code, text)."""
    run.wait_for_lines(out / "log.jsonl", steps)
    run.signal(number)
    return run.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Killed or stopped, and resumed


def killed_in_save(count, moment):
    """Prepares a run that dies in its count-th checkpoint: half of it written, all written, or just renamed."""
    owner, name = (os, "replace") if moment == "renamed" else (files, "_sync")
    function, seen = getattr(owner, name), []

    def dying(path, *more):
        function(path, *more)
        seen.extend([1] * str(path).endswith(".pt"))
        if len(seen) == count:
            if moment == "half written":
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


# Some moments anywhere, and three in the middle of a save
MOMENTS = [("running", random.Random(i).randint(0, STEPS - 1)) for i in range(3)]
MOMENTS += [("half written", 8), ("written", 3), ("renamed", STEPS)]  # the last before its epoch's adapter


@SLOW
@pytest.mark.parametrize("moment, step", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_weights_to_the_bit(command, uninterrupted, tmp_path, moment, step):
    run = Process("train", command, tmp_path, prepare=moment != "running" and partial(killed_in_save, step, moment))
    if moment == "running":
        run.wait_for_lines(tmp_path / "out" / "log.jsonl", step)
        time.sleep(random.Random(step).uniform(0, 0.1))  # a step takes about this long
        run.signal(signal.SIGKILL)
    code, text = run.wait()
    assert code == -signal.SIGKILL, text
    names = [path.name for path in (tmp_path / "out").glob("checkpoints/*")]
    text = finish(Process("train", [*command, "--resume"], tmp_path))
    assert ("resumed after step" in text) == any(name.startswith("step-") for name in names)
    assert_same_run(tmp_path / "out", uninterrupted)
    if moment != "running":
        assert f"resumed after step {step if moment == 'renamed' else step - 1}\n" in text
        assert any(name.startswith(".pronunciation-") for name in names) == (moment != "renamed")
        assert all(path.name.startswith("step-") for path in (tmp_path / "out").glob("checkpoints/*"))


@SLOW
@pytest.mark.parametrize("number, strategy", [(signal.SIGTERM, "lora"), (signal.SIGINT, "unfreeze")])
def test_a_stopped_run_saves_exits_with_0_and_resume_alone_goes_on(command, tmp_path, number, strategy):
    """And to the bit, also with the audio encoder in the graph."""
    arguments = [*command, "--strategy", strategy]
    finish(Process("train", [*arguments, "--output", "through"], tmp_path))
    run = Process("train", [*arguments, "--save-minutes", 60], tmp_path)
    code, text = struck(run, tmp_path / "out", number, 3)
    stopped = len(log(tmp_path / "out"))
    assert code == 0 and "Traceback" not in text and number.name in text, text
    assert f"stopped after step {stopped}, " in text and "--resume" in text and 3 <= stopped < STEPS
    assert f"step-{stopped:08d}.pt" in os.listdir(tmp_path / "out" / "checkpoints")
    assert f"resumed after step {stopped}" in finish(Process("train", ["--resume"], tmp_path))
    assert_same_run(tmp_path / "out", tmp_path / "through")


def two_signals():
    """The first step never ends."""
    train.train_step = lambda *arguments: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and time.sleep(60)


@SLOW
def test_a_second_signal_ends_the_run_at_once(command, tmp_path):
    code, text = Process("train", command, tmp_path, prepare=two_signals).wait()
    assert code == -signal.SIGINT and text.count("once more") == 1


@SLOW
def test_a_finished_run_stays_as_it_is_resumed_or_not(command, uninterrupted):
    before = trained(uninterrupted)
    (uninterrupted / "epoch-2" / "metrics.json").write_text("of evaluate.py")  # which lies beside the adapter
    assert f"resumed after step {STEPS}" in finish(Process("train", ["--resume"], uninterrupted.parent))
    code, text = Process("train", command, uninterrupted.parent).wait()
    assert code == 2 and "out/settings.json is there already: --resume" in text
    after = trained(uninterrupted)
    (uninterrupted / "epoch-2" / "metrics.json").unlink()
    assert all(torch.equal(before[key], after[key]) for key in before) and len(log(uninterrupted)) == STEPS


def disk_full_after(limit):
    """No file can grow beyond this many bytes: what a full disk does, without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@SLOW
def test_a_full_disk_says_so_and_leaves_the_last_good_checkpoint(command, uninterrupted, tmp_path):
    checkpoints = shutil.copytree(uninterrupted, tmp_path / "out") / "checkpoints"
    for file in (tmp_path / "out").glob("*.jsonl"):  # as if the run had been killed before its last save
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:11]))
    (checkpoints / "step-00000012.pt").unlink()
    ((name, content),) = ((path.name, path.read_bytes()) for path in checkpoints.iterdir())
    full = partial(disk_full_after, len(content) // 2)
    code, text = Process("train", ["--resume"], tmp_path, prepare=full).wait()
    assert code == 1 and "Traceback" not in text, text
    assert "error: out/checkpoints/step-00000012.pt cannot be written: File too large" in text
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == {name: content}


@SLOW
def test_without_a_broken_checkpoint_the_one_before_leads_to_the_same_weights(uninterrupted, tmp_path):
    newest = shutil.copytree(uninterrupted, tmp_path / "out") / "checkpoints" / "step-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    code, text = Process("train", ["--resume"], tmp_path).wait()
    assert code == 2 and "checkpoint out/checkpoints/step-00000012.pt" in text and "Traceback" not in text
    newest.unlink()
    assert "resumed after step 11" in finish(Process("train", ["--resume"], tmp_path))
    assert_same_run(tmp_path / "out", uninterrupted)


# ----------------------------------------------------------------------------------------------------------------------
# What may change when a run goes on, and whose folder it is


@pytest.fixture
def begun(where, monkeypatch):
    """A run of other than the usual settings that has begun in out/."""
    chosen = settings(monkeypatch, *where, *SIZES)
    record = train.as_json(chosen)
    write_text(Path("out/settings.json"), json.dumps({"written_by": files.signature("train.py")} | record))
    return chosen


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_resume_alone_reads_the_runs_settings_and_takes_what_is_not_the_method(begun, monkeypatch):
    assert settings(monkeypatch, "--resume") == replace(begun, resume=True)
    changes = ["--rank", 4, "--micro-batch", 3, "--gradient-checkpointing", "--save-minutes", 5, "--data", "moved"]
    expected = {"micro_batch": 3, "gradient_checkpointing": True, "save_minutes": 5.0, "data": "moved"}
    assert settings(monkeypatch, "--resume", *changes) == replace(begun, resume=True, **expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", 1e-3], "--learning-rate 0.001: the run in out has 0.003; leave it out"),
        (["--rank", 4, "--seed", 1], "--seed 1: the run in out has 0"),
        (["--learning_rate=1e-3"], "--learning-rate 0.001: the run in out has 0.003"),  # tyro takes it
    ],
)
def test_a_setting_of_the_method_that_differs_is_refused_by_name(begun, monkeypatch, arguments, message):
    with pytest.raises(cli.InputError, match=message):
        settings(monkeypatch, "--resume", *arguments)


def test_a_run_is_not_gone_on_with_under_other_prompts(begun, monkeypatch):
    monkeypatch.setitem(prompts.PROMPTS, "MDD", prompts.MDD_PROMPT + " ")
    with pytest.raises(cli.InputError, match="run in out was begun with other prompts"):
        settings(monkeypatch, "--resume")


def test_a_run_that_is_there_is_not_begun_again_and_a_wrong_path_is_named_first(begun, short_run, monkeypatch):
    for more, message in (
        (["--model", "none"], "model none"),
        (["--data", "none"], "corpus folder none"),
        ([], "out/"),
    ):
        with pytest.raises(cli.InputError, match=message) as error:
            short_run(monkeypatch, *more)
    assert "out/settings.json is there already: --resume goes on" in str(error.value)


@pytest.mark.parametrize("name", ["log.jsonl", "curves.png", "epoch-1/mine", "checkpoints/step-00000001.pt"])
@pytest.mark.parametrize("how", [[], ["--resume"]])
def test_a_file_that_a_run_would_overwrite_is_named_and_left(short_run, monkeypatch, name, how):
    write_text(Path("out") / name, "mine")
    with pytest.raises(cli.InputError, match=f"out/{Path(name).parts[0]} is there already, and no settings.json"):
        short_run(monkeypatch, *how)
    assert (Path("out") / name).read_text() == "mine" and len(list(Path("out").glob("[!.]*"))) == 1


STEP = {"step": 1, "loss": 1.0, "gradient_norm": 5.0}


def test_a_log_with_a_broken_line_is_named(tmp_path):
    write_text(tmp_path / "log.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(cli.InputError, match="^line 2 of .*log.jsonl: "), runs._open_log(tmp_path / "log.jsonl", 3):
        pass


@pytest.mark.parametrize("content, message", [({"strategy": 1}, "strategy 1: "), ([], "")])
def test_broken_settings_of_a_run_are_named_with_field_and_value(begun, monkeypatch, content, message):
    write_text(Path("out/settings.json"), json.dumps(content))
    with pytest.raises(cli.InputError, match=f"^[^\n]*out/settings.json: {message}[^\n]*$"):
        settings(monkeypatch, "--resume")


def test_a_last_line_that_was_cut_off_is_written_again(tmp_path):
    path = write(tmp_path / "log.jsonl", [STEP | {"step": step} for step in (1, 2, 3)])
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with runs._open_log(path, 2) as file:
        print(json.dumps(STEP | {"step": 3, "loss": 9.0}), file=file)
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_the_curves_show_every_step_means_of_their_neighbours_and_validation():
    lines = [{"step": step, "loss": 1 / step, "gradient_norm": step} for step in range(1, 101)]
    shown = [
        {drawn.get_label(): drawn.get_xydata().tolist() for drawn in axis.get_lines()}
        for axis in runs.curves(lines, {60: 0.3}).axes
    ]
    assert shown[0]["each step"] == [[step, 1 / step] for step in range(1, 101)]
    assert dict(shown[0]["smoothed"])[60] == pytest.approx(sum(1 / step for step in range(58, 63)) / 5)
    assert shown[0]["held-out speakers, after an epoch"] == [[60, 0.3]]
    assert shown[1]["each step"][9] == [10, 10.0] and shown[1]["smoothed"][9] == pytest.approx([12, 12.0])


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def state():
    """Weights and an optimiser that has made a step, and their checkpoint."""
    weights = {"a": torch.nn.Parameter(torch.randn(40, 30)), "b": torch.nn.Parameter(torch.randn(7))}
    optimiser = torch.optim.AdamW(weights.values())
    sum(weight.square().sum() for weight in weights.values()).backward()
    optimiser.step()
    runs.save(Path("checkpoints"), 4, weights, optimiser, "corpus")
    return weights, optimiser, Path("checkpoints/step-00000004.pt")


def holds(weights, optimiser):
    """All that a run goes on from, as plain values."""
    random_numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    moments = {index: {k: v.tolist() for k, v in own.items()} for index, own in optimiser.state.items()}
    return [w.tolist() for w in weights.values()], list(moments.values()), random_numbers


def disturb(weights, optimiser):
    for weight in weights.values():
        weight.data += 1
        optimiser.state[weight]["exp_avg"] += 1
    random.random(), np.random.rand(), torch.rand(1)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_changes_nothing(state):
    weights, optimiser, path = state
    content, expected, found = path.read_bytes(), holds(weights, optimiser), 0
    draw = random.Random(0)
    for place in [draw.randrange(8 * len(content)) for _ in range(300)]:
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        disturb(weights, optimiser)
        try:
            runs.restore(path, "corpus", weights, optimiser)
        except cli.InputError:
            found += 1
        else:
            assert holds(weights, optimiser) == expected, place
    assert 200 < found < 300  # and random numbers, moments and weights did come back


def saved_again(**changes):
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps({"step": Payload()})),
        saved_again(weights=Payload()),
        saved_again(weights={}),
        saved_again(weights={"a": torch.zeros(40, 30), "b": torch.zeros(1)}),
        saved_again(optimiser={}),
        saved_again(corpus="another"),
    ],
)
def test_what_is_no_checkpoint_of_the_run_is_refused_and_nothing_executed(state, spoil):
    weights, optimiser, path = state
    spoil(path)
    with pytest.raises(cli.InputError, match=f"^checkpoint {path} cannot [^\n]*--resume takes the one before it$"):
        runs.restore(path, "corpus", weights, optimiser)
    assert not Path("executed").exists()


def test_a_moved_corpus_is_the_same_corpus_and_another_label_another(utterances):
    first, *rest = (replace(u, recording=None) for u in utterances)
    assert data.fingerprint([first, *rest]) == data.fingerprint(utterances)
    word = replace(first.words[0], heard=("x",))
    for change in ({"scores": first.scores | {"total": 11}}, {"words": (word, *first.words[1:])}):
        assert data.fingerprint([replace(first, **change), *rest]) != data.fingerprint(utterances)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters of a run


@pytest.mark.parametrize(
    "line, message", [("Before", "other prompts: 'MDD: Before' is now 'MDD: .*'"), (None, "an older version")]
)
def test_an_adapter_of_other_prompts_or_an_older_version_is_refused(tmp_path, line, message):
    asked = {task: prompts.build_prompt(task) for task in prompts.TASKS}
    if line:
        asked["MDD"] = "\n".join([line, *asked["MDD"].split("\n")[1:]])
        write_text(tmp_path / "epoch-1" / "prompts.json", json.dumps(asked))
    write_text(tmp_path / "epoch-1" / "settings.json", json.dumps(TRAINED | {"prompts": line}))
    with pytest.raises(cli.InputError, match=f"^[^\n]*epoch-1 was trained with {message}[^\n]*$"):
        runs.adapters(tmp_path, None)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def assert_near(one, other, keys=("loss", "gradient_norm")):
    """The same steps and weights but for rounding.

    The audio encoder's key biases are left out: they shift all attention scores of a query alike, so their gradient is
    zero, and Adam makes steps of its rounding.
    """
    for key in keys:
        assert [line[key] for line in log(other)] == pytest.approx([line[key] for line in log(one)], rel=1e-5), key
    one, other = ({k: v for k, v in trained(run).items() if "k_proj.bias" not in k} for run in (one, other))
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).norm() <= 1e-5 * one[key].norm(), key


@SLOW
@pytest.mark.parametrize("strategy", models.STRATEGIES)
def test_two_processes_give_the_losses_and_weights_of_one(command, tmp_path, strategy):
    arguments = [*command, "--dropout", 0, "--strategy", strategy, "--epsilon", 1e-4, "--save-minutes", 60]
    finish(Process("train", [*arguments, "--output", "one"], tmp_path))
    both = together("train", [*arguments, "--output", "two", "--micro-batch", 2], tmp_path)
    assert "computed 2 at a time in each of 2 processes" in finish(*both)
    assert "corpus:" not in both[1].text() and "step/s" not in both[1].text()
    assert_near(
        tmp_path / "one", tmp_path / "two", ("step", "loss", "gradient_norm", "supervised_tokens", "learning_rate")
    )


@SLOW
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
    """Write down each step that this process takes."""
    step = train.train_step

    def noted(*arguments):
        with open(f"steps-{os.environ['RANK']}.txt", "a") as file:
            print("step", file=file)
        return step(*arguments)

    train.train_step = noted


@SLOW
def test_a_signal_to_one_process_stops_both_at_one_step_and_one_alone_may_go_on(command, tmp_path):
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


@SLOW
def test_torchrun_trains_and_evaluates_as_one_process_does(command, tmp_path):
    trained = script(*TORCHRUN, ROOT / "train.py", *command, "--epochs", 1, "--validation", 0.5, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("corpus:") == 1 and "on held-out speakers;" in trained.stdout
    arguments = "--adapter out --limit 7 --batch-size 2 --max-new-tokens 30".split()
    both = script(*TORCHRUN, ROOT / "evaluate.py", *arguments, "--output", "two", cwd=tmp_path)
    assert both.returncode == 0 and both.stdout.count("\nTable 3") == 1, both.stderr
    finish(Process("evaluate", [*arguments, "--output", "one"], tmp_path))
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def fails_on_rank_1():
    loss = models.SpeechModel.loss

    def failing(model, batch, audio):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch, audio)

    models.SpeechModel.loss = failing


@SLOW
def test_when_one_process_fails_its_error_is_said_and_none_goes_on(command, tmp_path):
    first, second = together("train", command, tmp_path, prepare=fails_on_rank_1)
    code, text = second.wait()
    assert code == 1 and "train.py (rank 1): error: out of memory with micro-batches of 4" in text
    assert first.wait()[0] != 0 and log(tmp_path / "out") == []


@SLOW
def test_a_mistake_that_all_processes_see_is_said_once(command, tmp_path):
    first, second = together("train", [*command, "--data", "nowhere"], tmp_path)
    code, text = first.wait()
    time.sleep(1)
    second.signal(signal.SIGTERM)  # as torchrun does, well before cli.RANK_0_FIRST is over
    assert code == 2 and text.startswith("train.py: error: corpus folder nowhere") and len(text.splitlines()) == 1
    assert second.wait() == (-signal.SIGTERM, "")


@SLOW
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
