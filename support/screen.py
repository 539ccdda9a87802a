"""Screen: tables and text as wide as the terminal, at most a page; plain where the output is a file or a pipe."""

import math
import re
import sys
import textwrap

from rich.console import Console
from rich.padding import Padding
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
    table = Table(box=None, padding=(0, 0 if numbers else 1, 0, 0), pad_edge=False)
    if own:
        table.add_column(width=2)
    table.add_column(overflow="fold")
    if numbers:
        columns, rows = _aligned(columns, rows)
    for title in columns:
        table.add_column(Text(title), no_wrap=numbers, overflow="fold")
    for number, (name, texts) in enumerate(rows):
        mark = [">" if number < own else ""] if own else []
        table.add_row(*mark, Padding(Text(name), (0, 1, 0, 0)), *map(Text, texts), style="bold" if number < own else "")
    say("", caption)
    Console(width=width(), highlight=False).print(table)


def _aligned(titles, rows):
    """Titles and rows of numbers with each line at the right of its column; marks hang over the numbers' end."""
    columns = [[texts[i] for _, texts in rows] for i in range(len(titles))]
    rooms = list(map(_room, titles, columns))
    if width() - sum(map(sum, rooms)) < NAMES:
        titles = [re.sub(r"\w{7,}", lambda word: word[0][:5] + ".", title) for title in titles]
        rooms = list(map(_room, titles, columns))
    titles = [_right("\n".join(textwrap.wrap(title, room)), room, gap) for title, (room, gap) in zip(titles, rooms)]
    return titles, [(name, [_right(text, *room) for text, room in zip(texts, rooms)]) for name, texts in rows]


def _room(title, texts):
    """Width of a column, as its longest number or word of its title, and what is kept free behind it."""
    lines = [line for text in texts for line in text.split("\n")]
    room = max(len(part.rstrip("*")) for part in [*title.split(), *lines])
    return room, 2 if any(len(line) > room for line in lines) else 1


def _right(text, room, gap):
    lines = [(line.rstrip("*"), "*" if line.endswith("*") else "") for line in text.split("\n")]
    return "\n".join(number.rjust(room) + mark.ljust(gap) for number, mark in lines)


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


def with_halves(rows, columns):
    """Rows of evaluate.Row for `show_table`: under each number half the width of its interval."""
    lines = []
    for row in rows:
        found = [row.intervals.get(key, (math.nan, math.nan)) for key in columns]
        halves = ["" if math.isnan(low) else f"\n±{(high - low) / 2:.3f}" for low, high in found]
        lines.append((row.label, [text + half for text, half in zip(cells(row.numbers, columns, row.near), halves)]))
    return lines
