"""What all scripts share: errors in one line, files written whole, locks."""

import errno
import multiprocessing
import os
import time

from conftest import fifo
import psutil
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
    ],
)
def test_an_error_for_the_user_is_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_script("x.py", main)
    assert stop.value.code == code and capsys.readouterr().err == line + "\n"


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise ValueError("no such key")

    with pytest.raises(ValueError):
        cli.run_script("x.py", main)


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
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


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


@pytest.mark.parametrize("make", [fifo, os.mkdir])
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / ".train.lock")
    with pytest.raises(cli.InputError, match="train.lock is not a regular file: .*--output"):
        with files.lock(tmp_path, "train", "--output"):
            raise AssertionError("locked")
