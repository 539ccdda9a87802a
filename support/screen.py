"""Screen: tables and text as wide as the terminal, at most a page; plain where the output is a file or a pipe."""

import math
import re
import sys
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 100  # columns; a file or a pipe has as many
NAMES = 16  # columns that names of rows have at least, else long words in the head are cut
CLOSE = 0.05  # a number this near to the one that it is compared with is marked


def width(stream=None):
    """Columns that may be printed into; of stdout, where no other stream is given."""
    stream = stream or sys.stdout
    return min(WIDEST, Console(file=stream).width) if stream.isatty() else WIDEST


def fill(text, indent=2):
    """Text in lines that fit, the second one and those after it indented. Paths and flags stay whole."""
    return textwrap.fill(text, width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def say(*notes):
    """Print each note from a new line on."""
    print(*map(fill, notes), sep="\n")


def show_table(caption, columns, rows, own=0, numbers=True):
    """Print a table. columns: titles; rows: list of (name, texts of its cells), a text may have a second line.

    own: how many rows, from the first, are marked; numbers: whether the cells are numbers, or text.
    """
    heads = columns
    if numbers and width() - sum(_rooms(columns, rows)) < NAMES:
        heads = [re.sub(r"\w{7,}", lambda word: word[0][:5] + ".", title) for title in columns]
    table = Table(box=None, padding=0, pad_edge=False)
    if own:
        table.add_column(width=2)
    table.add_column(overflow="fold")
    for head, room in zip(heads, _rooms(heads, rows)):
        style = {"justify": "right", "width": room} if numbers else {"overflow": "fold"}
        table.add_column(_ended(head), **style)
    for number, (name, texts) in enumerate(rows):
        mark = [">" if number < own else ""] if own else []
        table.add_row(*mark, _ended(name), *map(_ended, texts), style="bold" if number < own else "")
    say("", caption)
    Console(width=width(), highlight=False).print(table)


def _rooms(heads, rows):
    """Width of each column of numbers, with a space behind them, where a mark may stand; heads wrap between words."""
    lines = [[line.rstrip("*") for _, texts in rows for line in texts[i].split("\n")] for i in range(len(heads))]
    return [max(map(len, [*head.split(), *column])) + 1 for head, column in zip(heads, lines)]


def _ended(text):
    """A cell's text, a space behind each line that has no mark there."""
    return Text("\n".join(line if line.endswith("*") else line + " " for line in text.split("\n")))


# ----------------------------------------------------------------------------------------------------------------------
# Numbers as text


def cells(numbers, columns, near=()):
    """Numbers as text, "-" where there is none; those close to the one that `near` has for the key are marked."""
    texts = []
    for key in columns:
        value = numbers.get(key, math.nan)
        mark = "*" if key in near and abs(value - near[key]) <= CLOSE else ""
        texts.append("-" if math.isnan(value) else f"{value:.3f}{mark}")
    return texts


def interval_cells(intervals, columns):
    """Intervals as text, "-" where there is none."""
    found = [intervals.get(key, (math.nan, math.nan)) for key in columns]
    return ["-" if math.isnan(low) else f"{low:.2f}..{high:.2f}" for low, high in found]


def with_halves(rows, columns):
    """Rows of evaluate.Row for `show_table`: under each number half the width of its interval."""
    lines = []
    for row in rows:
        found = [row.intervals.get(key, (math.nan, math.nan)) for key in columns]
        halves = ["" if math.isnan(low) else f"\n±{(high - low) / 2:.3f}" for low, high in found]
        lines.append((row.label, [text + half for text, half in zip(cells(row.numbers, columns, row.near), halves)]))
    return lines
