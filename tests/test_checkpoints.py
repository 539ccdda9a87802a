"""Checkpoints, and other files of a run that is resumed: whole, of this run, or refused in one line."""

from dataclasses import replace
import io
import json
from pathlib import Path
import pickle
import random

from conftest import fifo, read_lines
import numpy as np
import pytest
import torch

import data
from support import checkpoints, cli


@pytest.fixture(scope="module")
def run_of_two_checkpoints(short_run, tmp_path_factory):
    """{name: content} of a finished run's files."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        short_run(patch)
    names = ["settings.json", "log.jsonl", *(f"checkpoints/step-0000000{step}.pt" for step in (3, 4))]
    return {name: (folder / "out" / name).read_bytes() for name in names}


@pytest.fixture
def newest(run_of_two_checkpoints):
    """The newest checkpoint of a copy of a finished run, which a test may spoil."""
    Path("out/checkpoints").mkdir(parents=True)
    for name, content in run_of_two_checkpoints.items():
        (Path("out") / name).write_bytes(content)
    return Path("out/checkpoints/step-00000004.pt")


@pytest.fixture
def resume(short_run, monkeypatch):
    """Resumes the run in out/, in this process."""
    return lambda *arguments: short_run(monkeypatch, "--resume", *arguments)


class Payload:
    """Unpickling this makes a file: a checkpoint from elsewhere could as well do anything else."""

    def __reduce__(self):
        return Path.touch, (Path("executed").absolute(),)


def torch_saved(change):
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_bytes(pickle.dumps({"step": Payload()})),
        torch_saved(lambda state: state | {"settings": Payload()}),
        torch_saved(lambda state: {"step": 4}),
        torch_saved(lambda state: [4]),
        fifo,
        lambda path: path.unlink() or path.mkdir(),
        lambda path: path.unlink() or path.symlink_to("/dev/zero"),
    ],
)
def test_what_is_no_checkpoint_is_named_refused_and_the_older_one_offered_and_nothing_executed(newest, spoil):
    spoil(newest)
    older = newest.with_name("step-00000003.pt")
    with pytest.raises(cli.InputError, match=f"^checkpoint {newest} .*--resume --checkpoint {older}$"):
        checkpoints.read(newest, {}, "", 4)
    assert not Path("executed").exists()


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
        lambda state: state.update(step=5),
    ],
)
def test_a_checkpoint_with_other_things_inside_is_refused_in_one_line(newest, resume, damage):
    state = torch.load(newest, weights_only=True)
    damage(state)
    torch.save(state, newest)
    with pytest.raises(cli.InputError, match="^[^\n]*checkpoint[^\n]*$"):
        resume()


@pytest.mark.parametrize(
    "change, message",
    [
        (["--learning-rate", 1e-3], "--learning-rate 0.003, not 0.001"),
        (["--epochs", 3], "--epochs 2, not 3"),
        (["--seed", 1, "--rank", 2], "--rank 4, not 2; --seed 0, not 1"),
        (["--limit", 7], "--limit 8, not 7"),
        (["--checkpoint", "elsewhere.pt"], "elsewhere.pt is missing"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(newest, resume, change, message):
    before = Path("out/settings.json").read_bytes()
    with pytest.raises(cli.InputError, match=message):
        resume(*change)
    assert Path("out/settings.json").read_bytes() == before


def test_a_checkpoint_of_a_run_on_other_labels_is_refused(newest, utterances):
    settings = torch.load(newest, weights_only=True)["settings"]
    assert checkpoints.read(newest, settings, data.fingerprint(utterances[:8]), 4)["step"] == 4
    other = [replace(utterances[0], text="OTHER"), *utterances[1:8]]
    with pytest.raises(cli.InputError, match="--data"):
        checkpoints.read(newest, settings, data.fingerprint(other), 4)


def test_a_moved_corpus_is_the_same_corpus_and_every_label_counts(utterances):
    same = [replace(u, recording=None) for u in utterances]
    assert data.fingerprint(same) == data.fingerprint(utterances)
    first, *rest = utterances
    word = first.words[0]
    changes = [{name: "x"} for name in ("samples", "speaker", "text", "id")]
    changes += [{"scores": first.scores | {"total": 11}}, {"scores": None}, {"words": ()}]
    changes += [{"words": (replace(word, **{name: ("x",)}), *first.words[1:])} for name in ("heard", "canonical")]
    digests = {data.fingerprint([replace(first, **change), *rest]) for change in changes}
    assert len(digests | {data.fingerprint(utterances), data.fingerprint(rest)}) == len(changes) + 2


def test_random_numbers_go_on_where_they_were():
    state, buffer = checkpoints._random_state(), io.BytesIO()
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    torch.save(state, buffer)
    buffer.seek(0)
    checkpoints._set_random_state(torch.load(buffer, weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_the_reason_for_a_full_disk_is_the_systems():
    """torch.save replaces the system's error with one about positions in a file."""
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb", buffering=0) as file:
        checkpoints._write({"weights": torch.zeros(10_000)}, file)


def equal(one, other):
    """Equality of what a checkpoint holds."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_changes_nothing(newest):
    content, whole = newest.read_bytes(), torch.load(newest, weights_only=True)
    draw, found = random.Random(0), 0
    for _ in range(150):
        place = draw.randrange(8 * len(content))
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        newest.write_bytes(spoilt)
        try:
            state = checkpoints.read(newest, whole["settings"], whole["corpus"], 4)
        except cli.InputError:
            found += 1
        else:
            assert equal(state, whole), place
    assert found > 100


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run


NAMES = ["settings.json", "log.jsonl", "validation.jsonl", "curves.png", "epoch-1", "checkpoints/step-00000001.pt"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_a_run_would_overwrite_is_named_and_left(short_run, monkeypatch, name):
    path = Path("out") / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(cli.InputError, match=f"{path} is there already: .*--resume.*--output"):
        short_run(monkeypatch)
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.jsonl", "curves.png", "epoch-1/mine"])
def test_a_folder_that_is_not_of_a_run_is_not_resumed(resume, name):
    path = Path("out") / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(cli.InputError, match="out/settings.json cannot be read: No such file"):
        resume()
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


RUN = {"strategy": "lora", "speech_adapter": "merge", "epochs": 1, "seed": 0}
STEP = {"step": 1, "loss": 1.0, "learning_rate": 0.1}
EPOCH = {"epoch": 1, "best": True, "step": 1, "loss": 1.0}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("settings.json", [[]], ""),
        ("settings.json", [{"theme": "dark"}], ": strategy is missing"),
        ("settings.json", [RUN | {"strategy": 1}], ": strategy 1: "),
        ("log.jsonl", [STEP | {"step": "one"}], ": step 'one'"),
        ("log.jsonl", b"\xff\xfe\n", " is not UTF-8 text"),
        ("log.jsonl", b"[" * 100_000 + b"\n", ": .*recursion"),
        ("log.jsonl", [STEP, STEP], " has step 1 .*twice"),
        ("validation.jsonl", [EPOCH | {"best": "yes"}], ": best 'yes'"),
        ("validation.jsonl", [EPOCH | {"loss": float("nan")}], ": loss nan"),
        ("validation.jsonl", [EPOCH | {"per": "x"}], ": per 'x'"),
        ("validation.jsonl", [EPOCH, EPOCH], " has an epoch twice"),
    ],
)
def test_a_broken_file_of_a_run_that_is_resumed_is_named_with_field_and_value(newest, resume, name, content, message):
    lines = content if isinstance(content, bytes) else "".join(json.dumps(line) + "\n" for line in content).encode()
    (Path("out") / name).write_bytes(lines)
    with pytest.raises(cli.InputError, match=f"^[^\n]*out/{name}{message}[^\n]*$"):
        resume()


def test_a_last_line_that_was_cut_off_is_written_again_and_what_a_killed_save_left_is_cleared_away(newest, resume):
    log, expected = Path("out/log.jsonl"), read_lines(Path("out/log.jsonl"))
    *lines, last = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines) + last[: len(last) // 2])
    newest.rename(newest.with_suffix(".pt.unfinished"))  # so the last step is done again
    Path("out/epoch-1.unfinished").mkdir()
    mine = Path("out/notes.txt"), Path("out/backup.tmp")
    for path in mine:
        path.write_text("mine")
    resume()
    assert [line["loss"] for line in read_lines(log)] == [line["loss"] for line in expected]
    assert not [*Path("out").rglob("*.unfinished")] and {path.read_text() for path in mine} == {"mine"}
