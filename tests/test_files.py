"""What all scripts share: errors in one line, files written whole, folders owned by one command at a time."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest
from safetensors import SafetensorError
import torch

from support import cli, files


@pytest.mark.parametrize(
    "error, code, line",
    [
        (cli.InputError("no such corpus"), 2, "x.py: error: no such corpus"),
        (cli.RunError("step 3: loss nan"), 1, "x.py: error: step 3: loss nan"),
        (OSError(28, "No space left on device"), 1, "x.py: error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "x.py: stopped"),
    ],
)
def test_an_error_for_the_user_is_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_script("x.py", main)
    assert stop.value.code == code and capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    "error, raised, reason",
    [
        (OSError(28, "No space left on device"), cli.RunError, "file cannot be written: .*No space left"),
        (SafetensorError("I/O error: No space left"), cli.RunError, "file cannot be written: .*No space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA"),  # not the disk's failure
    ],
)
def test_what_cannot_be_written_leaves_the_old_file_and_the_reason(tmp_path, error, raised, reason):
    (tmp_path / "file").write_text("old")
    with pytest.raises(raised, match=reason), files.whole(tmp_path / "file") as temporary:
        temporary.write_text("ne")
        raise error
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    for foreign in (False, True):
        if foreign:
            (tmp_path / "epoch-1" / "notes.txt").write_text("mine")
            with pytest.raises(cli.RunError, match="it holds notes.txt"), files.whole(tmp_path / "epoch-1") as folder:
                folder.mkdir()
        else:
            with files.whole(tmp_path / "epoch-1") as folder:
                folder.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["epoch-1", "notes.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# Ownership


def own(folder):
    return files.own(folder, "train.py", "settings.json", ["log.jsonl", "epoch-*"])


def test_what_the_folders_mark_does_not_say_is_ours_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()  # of a name that train.py does not write
    with own(tmp_path):
        (tmp_path / "epoch-1").mkdir()
    for mark in (None, "{}", '{"written_by": "pronunciation/evaluate.py"}'):
        if mark:
            (tmp_path / "settings.json").write_text(mark)
        with pytest.raises(cli.InputError, match="epoch-1 is there already, and no settings.json .*another --output"):
            with own(tmp_path):
                raise AssertionError("owned")
    (tmp_path / "settings.json").write_text('{"written_by": "pronunciation/train.py"}')
    with own(tmp_path):
        pass


def test_a_running_command_keeps_another_out_and_a_killed_one_does_not(tmp_path):
    def hold():
        with own(tmp_path), files.whole(tmp_path / "epoch-1") as folder:
            folder.mkdir()
            time.sleep(30)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    half = tmp_path / f"{files.NEW}{holder.pid}-epoch-1"
    while not half.exists():
        time.sleep(0.01)
    with pytest.raises(cli.InputError, match="in use by another train.py.*another --output"), own(tmp_path):
        raise AssertionError("owned twice")
    with files.own(tmp_path, "evaluate.py", "metrics.json", ["metrics.json"]):
        assert half.exists()  # what another command writes stays
    holder.kill()
    holder.join()
    living = f"{files.NEW}{os.getpid()}-epoch-1"
    others = [tmp_path / name for name in (living, f"{files.NEW}1-predictions.jsonl", "theirs.unfinished")]
    for path in others:
        path.touch()
    with own(tmp_path):
        assert not half.exists() and all(path.exists() for path in others)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("elsewhere"), lambda path: path.mkdir()])
def test_a_lock_that_is_a_link_or_a_folder_is_refused_and_followed_nowhere(tmp_path, make):
    make(tmp_path / ".pronunciation-train.py.lock")
    with pytest.raises(cli.InputError, match="cannot write into .*another --output"), own(tmp_path):
        raise AssertionError("owned")
    assert not (tmp_path / "elsewhere").exists()


def test_where_the_file_system_has_no_locks_a_run_goes_on_and_says_so(monkeypatch, tmp_path, capsys):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with own(tmp_path):
        assert f"{tmp_path} cannot be locked" in capsys.readouterr().err
