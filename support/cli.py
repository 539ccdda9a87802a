"""How does a script talk with its user: settings, errors and exit codes, text and tables.

Exit codes: 0 done, 1 failed while running, 2 the user's input is wrong; an error is one line that says what to do.
Ids, paths, labels and answers come from outside: what is printed here has no control characters of a terminal in it.
Text is as wide as the terminal, at most a page; plain where the output is a file or a pipe.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
import ctypes
import importlib.util
import io
import os
from pathlib import Path
import re
import signal
import sys
import textwrap
import time
import tomllib
from typing import Annotated, TextIO, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from tqdm import tqdm
import tyro

WIDEST = 100  # columns; a file or a pipe has as many
NARROWEST = 80  # columns of a table; a narrower terminal breaks its lines, and rich would cut its numbers
LONGEST = 6  # characters of a word above numbers, where less than the widest fits
# C0 and C1, what turns the direction of text around, and what no encoding has: bytes of a name that is not UTF-8
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
RANK_0_FIRST = 3  # seconds that another process waits with an error message
LARGEST = 2**31 - 1  # of a whole number; what counts utterances, steps or tokens is far below
MOMENT = 1  # seconds; what takes less has no progress bar
SHOWN = 60  # characters of a wrong value that a message quotes
PR_SET_PDEATHSIG = 1  # of Linux: a signal to this process when its parent ends
Settings = TypeVar("Settings")
Rows = Sequence[tuple[str, Sequence[str]]]  # a name, and the texts of its cells

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class InputError(Exception):
    """The user's input is wrong: the message names the value and the remedy. Scripts print it and exit with 2.

    Further arguments are lines of their own, such as the faults of a corpus.
    """

    def __str__(self) -> str:
        return "\n  ".join(map(str, self.args))


class RunError(Exception):
    """The run cannot go on: the message says what happened and what helps. Scripts print it and exit with 1."""


def parse(settings: type[Settings], description: str) -> Settings:
    """The command line as an instance of `settings`, a dataclass: one field a flag, its comment the flag's help.

    Fields may have pydantic's types, such as those above, and tyro's Positional. Raises InputError for what is not a
    flag, and for a value that its type does not allow. `--help` and `--version` print and end the process.
    """
    if "--version" in sys.argv[1:]:
        print("pronunciation", version())
        sys.exit()
    for before, text in zip(sys.argv, sys.argv[1:]):
        if not text or re.fullmatch("--[a-z_-]+=", text):  # an empty path would be the folder that one is in
            raise InputError(f"{(text or before).rstrip('=')} is empty: give it a value, or leave it out")
        if re.search("[\ud800-\udfff]", text):  # so Python writes bytes that are not UTF-8; no model card could name it
            raise InputError(f"{ascii(text)} is not UTF-8: rename it")
    main = sys.modules["__main__"].__spec__  # of `python -m`
    program = f"python -m {main.name}" if main else f"python {os.path.basename(sys.argv[0])}"
    lines = textwrap.indent(description, " ", lambda line: True)  # tyro joins those that begin with none
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed = tyro.cli(settings, prog=program, description=lines, config=(tyro.conf.FlagCreatePairsOff,))
        return TypeAdapter(settings).validate_python(vars(parsed))
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_one_line(said.getvalue())) from None
    except ValidationError as error:
        raise InputError(flag(reason(error))) from error


def version() -> str:
    """Of this project, as pyproject.toml declares it."""
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]


def _one_line(panel):
    """tyro's framed message without its frame and its hints of where to read on."""
    text = " ".join(filter(None, (line.strip("│╭╮╰╯─ ") for line in panel.splitlines()[1:])))
    return re.split(" ?(?:Argument helptext|For full helptext|Similar arguments)", text)[0].rstrip(". ")


def given(name: str) -> bool:
    """Whether the user wrote the flag of this setting; tyro takes --batch_size for --batch-size."""
    return any(part.split("=")[0].replace("_", "-") == flag(name) for part in sys.argv[1:])


def flag(name: str) -> str:
    """A setting as the user writes it: data_revision -> --data-revision. What follows the name stays as it is."""
    name, space, rest = name.partition(" ")
    return f"--{name.split('.')[0].replace('_', '-')}{space}{rest}"


def need(package: str) -> None:
    """Raises InputError where an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is needed and not installed: pip install {package.replace('_', '-')}")


def reason(error: ValidationError) -> str:
    """The first fault that pydantic found, as `field value: what is wrong`."""
    fault = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{field} is missing"
    if fault["type"] == "json_invalid":
        return fault["msg"]
    value = ascii(fault["input"])
    value = value if len(value) <= SHOWN else value[:SHOWN] + "..."
    return f"{field + ' ' if field else ''}{value}: {fault['msg'].removeprefix('Value error, ')}"


def run_script(name: str, main: Callable[[], None]) -> None:
    """Call main(). InputError, RunError, the system's error and Ctrl-C become one line and an exit code: 2, 1, 1, 130.

    A reader of the output that went away (`| head -1`) ends the script without a word. Where all processes of torchrun
    meet the same error, rank 0 says it for all: torchrun ends the others meanwhile.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # torchrun ends its processes itself, unless it was killed: then they would go on, or wait for each other.
        # Files are renamed when they are whole, so nothing half written is left in a file's place.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.stdout.reconfigure(errors="replace")  # a log that takes no ± gets a question mark
    code = _exit_code(name, main)
    if "RANK" in os.environ:
        # Nothing may follow: a thread of Gloo that still holds the last tensor it sent aborts the process while Python
        # ends (pytorch/pytorch#190489), and destroy_process_group need not end it: DTensor keeps the group.
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _exit_code(name, main):
    try:
        main()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 1
    except KeyboardInterrupt:
        if process_rank() == 0:
            print(f"{name}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, RunError, OSError, SafetensorError) as error:  # the last one is of a full disk, too
        if process_rank():
            time.sleep(RANK_0_FIRST)
            name += f" (rank {process_rank()})"
        said = (
            "\n  ".join(visible(str(part)) for part in error.args)
            if isinstance(error, InputError)
            else visible(str(error))
        )
        print(f"{name}: error: {said}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def process_rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def first_line(error: BaseException) -> str:
    """What a library's error says, as far as it fits in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Text and tables


def visible(text: str) -> str:
    r"""Text with control characters as Python writes them, such as \x1b: none moves the cursor or begins a line."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def width(stream: TextIO | None = None) -> int:
    """Columns that may be printed into; of stdout, where no other stream is given."""
    stream = stream or sys.stdout
    return min(WIDEST, Console(file=stream).width) if stream.isatty() else WIDEST


def fill(text: str, indent: int = 2) -> str:
    """Text in lines that fit, the second one and those after it indented. Paths and flags stay whole."""
    text, after = visible(text), " " * indent
    return textwrap.fill(text, width(), subsequent_indent=after, break_long_words=False, break_on_hyphens=False)


class Progress(tqdm):
    """A progress bar of what takes more than a moment; a line for every twentieth of it where there is no terminal.

    Of rank 0, on standard error.
    """

    def __init__(self, *args, **options) -> None:
        self.told, self.lines = 0, not sys.stderr.isatty()  # twentieths that have a line
        options |= {"delay": MOMENT, "ncols": width(sys.stderr), "disable": process_rank() > 0}
        super().__init__(*args, **options)
        if self.lines:
            self.mininterval, self.miniters, self.sp = 0, 1, None  # every update is looked at; nothing at the end

    def display(self, *args, **options) -> None:
        if self._time() - self.start_t < self.delay:  # a new description is shown without regard to `delay`
            return
        if not self.lines:
            super().display(*args, **options)
        elif self.total and (done := int(20 * self.n / self.total)) > self.told:
            self.told = done
            print(self, file=self.fp, flush=True)

    def clear(self, *args, **options) -> None:
        if not self.lines:
            super().clear(*args, **options)


def say(*notes: str) -> None:
    """Print each note from a new line on, above a progress bar where there is one."""
    for note in notes:
        tqdm.write(fill(note))


def show_table(caption: str, columns: Iterable[str], rows: Rows, own: int = 0, numbers: bool = True) -> None:
    """Print a table. columns: titles; rows: a cell may have a second line.

    own: how many rows, from the first, are marked; numbers: whether the cells are numbers, or text.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    if own:
        table.add_column(width=1)
    table.add_column(overflow="fold")
    for title in map(visible, columns):
        if numbers:
            title = "\n".join(word if width() == WIDEST else _cut(word) for word in title.split())
        table.add_column(Text(title), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for number, (name, texts) in enumerate(rows):
        mark = [">" if number < own else ""] if own else []
        cells = ("\n".join(map(visible, text.split("\n"))) for text in [visible(name), *texts])
        table.add_row(*mark, *map(Text, cells), style="bold" if number < own else "")
    say("", caption)
    Console(width=max(NARROWEST, width()), highlight=False).print(table)


def _cut(word):
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "."
