"""Screen: tables and text as wide as the terminal, at most a page; plain where the output is a file or a pipe.

Ids, paths, labels and answers come from outside: what is printed here has no control characters of a terminal in it.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
import math
import re
import sys
import textwrap
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

WIDEST = 100  # columns; a file or a pipe has as many
LONGEST = 6  # characters of a word above numbers, where less than the widest fits
CLOSE = 0.05  # a number this near to the one that it is compared with is marked
# C0 and C1, what turns the direction of text around, and what no encoding has: bytes of a name that is not UTF-8
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Rows = Sequence[tuple[str, Sequence[str]]]  # a name, and the texts of its cells


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
    Console(width=width(), highlight=False).print(table)


def _cut(word):
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "."


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text


def cells(numbers: Mapping[str, float], columns: Iterable[str], near: Container[str] = ()) -> list[str]:
    """Numbers as text, "-" where there is none; those close to the one that `near` has for the key are marked."""
    texts = []
    for key in columns:
        value = numbers.get(key, math.nan)
        mark = "*" if key in near and abs(value - near[key]) <= CLOSE else ""
        texts.append("-" if math.isnan(value) else f"{mark}{value:.3f}")
    return texts


def with_halves(rows: Iterable, columns: Sequence[str]) -> Rows:
    """Rows of evaluate.Row for `show_table`: under each number half the width of its interval."""
    lines = []
    for row in rows:
        found = [row.intervals.get(key, (math.nan, math.nan)) for key in columns]
        halves = ["" if math.isnan(low) else f"\n±{(high - low) / 2:.3f}" for low, high in found]
        lines.append((row.label, [text + half for text, half in zip(cells(row.numbers, columns, row.near), halves)]))
    return lines
