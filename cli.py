"""How does a script talk with its user: settings, errors, exit codes, files that are whole.

Exit codes: 0 done, 1 failed while running, 2 the user's input is wrong; an error is one line that says what to do.
"""

import argparse
import errno
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

RANK_0_FIRST = 3  # seconds that another process waits with an error message


class InputError(Exception):
    """The user's input is wrong: the message names the value and the remedy. Scripts print it and exit with 2."""


class RunError(Exception):
    """The run cannot go on: the message says what happened and what helps. Scripts print it and exit with 1."""


class ArgumentParser(argparse.ArgumentParser):
    """One whose errors are InputErrors, so that they are said like all others: in one line, by one process."""

    def error(self, message):
        raise InputError(message)

    def parse_given(self):
        """The settings as a namespace, and the names of those that the user wrote."""
        settings = self.parse_args()
        nothing = argparse.Namespace(**dict.fromkeys(vars(settings)))
        given = vars(self.parse_args(namespace=nothing)).items()
        return settings, {name for name, value in given if value is not None}

    def refuse(self, conflicts):
        """Raises InputError for the first of the pairs (whether it is so, message) that is so."""
        for wrong, message in conflicts:
            if wrong:
                self.error(message)


def run_script(name, main):
    """Call main(). An InputError, a RunError or a full disk becomes one line and an exit code: 2, 1, 1.

    Where all processes of torchrun meet the same error, rank 0 says it for all: torchrun ends the others meanwhile.
    """
    try:
        main()
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if process_rank():
            time.sleep(RANK_0_FIRST)
            name += f" (rank {process_rank()})"
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def process_rank():
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


# ----------------------------------------------------------------------------------------------------------------------
# Types of settings


def positive_int(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def whole_number(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 up")
    return int(text)


def positive_float(text):
    if not 0 < _float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def fraction(text):
    if not 0 <= _float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to below 1")
    return float(text)


def seed(text):
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a seed from 0 to 2^32 - 1")
    return int(text)


def _float(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def whole(path):
    """Gives a temporary path for a file or folder; what is written there is synced to disk, then renamed to `path`.

    Raises RunError when it cannot be written; `path` then is as it was. Only rank 0 writes: what other processes write
    goes nowhere.
    """
    if process_rank():
        yield Path(os.devnull)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        _remove(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(f"{path} cannot be written: {reason}") from error


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def first_line(error):
    """What a library's error says, as far as it fits in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def make_folder(folder, setting):
    """Make a folder that will be written into now, so that a run does not fail on it after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"trial.tmp-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; choose another {setting}") from error
