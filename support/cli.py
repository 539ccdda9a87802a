"""How does a script talk with its user: settings, errors, exit codes.

Exit codes: 0 done, 1 failed while running, 2 the user's input is wrong; an error is one line that says what to do.
"""

import argparse
import errno
import math
import os
import re
import sys
import time

RANK_0_FIRST = 3  # seconds that another process waits with an error message
LARGEST = 2**31 - 1  # of a whole number; what counts utterances, steps or tokens is far below


class InputError(Exception):
    """The user's input is wrong: the message names the value and the remedy. Scripts print it and exit with 2."""


class RunError(Exception):
    """The run cannot go on: the message says what happened and what helps. Scripts print it and exit with 1."""


class ArgumentParser(argparse.ArgumentParser):
    """One whose errors are InputErrors, so that they are said like all others: in one line, by one process."""

    def error(self, message):
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's own, which all its ways lead through; a value must be text of one line, not empty."""
        args = sys.argv[1:] if args is None else list(args)
        for before, text in zip([self.prog, *args], args):
            if not text or re.fullmatch("--[a-z-]+=", text):  # an empty path would be the folder that one is in
                name = text.rstrip("=") or (before if before.startswith("--") else "a value")
                self.error(f"{name} is empty: give it a value, or leave it out")
            if re.search("[\x00-\x1f\x7f\ud800-\udfff]", text):  # Python writes bytes that are not UTF-8 as surrogates
                self.error(f"{ascii(text)} is not UTF-8 or holds a control character: rename it")
        return super().parse_known_args(args, namespace)

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

    A reader of the output that went away (`| head -1`) ends the script without a word. Where all processes of torchrun
    meet the same error, rank 0 says it for all: torchrun ends the others meanwhile.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        sys.exit(1)
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        if process_rank():
            time.sleep(RANK_0_FIRST)
            name += f" (rank {process_rank()})"
        print(f"{name}: error: {error}", file=sys.stderr)
        too_long = getattr(error, "errno", None) == errno.ENAMETOOLONG  # the name of a file, which the user gave
        sys.exit(2 if too_long or isinstance(error, InputError) else 1)


def process_rank():
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def first_line(error):
    """What a library's error says, as far as it fits in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Types of settings


def positive_int(text):
    return _whole_number(text, 1, LARGEST)


def whole_number(text):
    return _whole_number(text, 0, LARGEST)


def seed(text):
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text, lowest, highest):
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and lowest <= int(text) <= highest):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {lowest} to {highest:,}")
    return int(text)


def positive_float(text):
    if not 0 < _float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def fraction(text):
    if not 0 <= _float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to below 1")
    return float(text)


def _float(text):
    try:
        return float(text)
    except ValueError:
        return math.nan
