"""What is printed fits the screen: tables, text, and the line of progress."""

import os
from pathlib import Path
import re
import subprocess
import sys

from conftest import ROOT
import pytest
from records import one_hot, records

import evaluate
from support import run, screen


@pytest.fixture(params=[80, 100])
def columns(monkeypatch, request):
    monkeypatch.setattr(screen, "width", lambda stream=None: request.param)
    return request.param


def rows(count=12):
    lines = records(count, speakers=4)
    for line in lines[::2]:
        line |= {"scores": one_hot(3, low=4), "tokens": 9}
    return evaluate.rows_of(lines, "epoch-3", ("lora", 3)), [evaluate.copying_floor(lines)]


def test_no_line_is_wider_than_the_screen_and_every_number_is_whole(columns, capsys):
    ours, floors = rows()
    evaluate.show(ours, floors)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    for row in [*ours, *floors]:
        numbers = screen.cells(row.numbers, evaluate.TABLE_3, row.near)
        assert any(line.split()[-9:] == numbers for line in printed.splitlines()), numbers
    assert "…" not in printed


def test_wide_numbers_and_marks_stay_apart_and_digits_stand_below_digits(columns, capsys):
    rows = [("this run, epoch-9, expected", ["-0.041*"] * 9), ("x", ["-0.041"] * 9), ("y", ["0.041\n±0.345"] * 9)]
    screen.show_table("Table", ["accuracy"] * 9, rows, own=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-9:] for line in lines[3:]][0] == ["-0.041*"] * 9
    ends = [[match.end() for match in re.finditer(r"\d\d\d", line)] for line in lines if "0." in line]
    assert len(ends) == 4 and all(other == ends[0] for other in ends)


def test_this_run_comes_first_and_is_marked_with_half_its_interval_below(columns, capsys):
    ours, floors = rows()
    evaluate.show(ours, floors)
    table = capsys.readouterr().out.split("Table 3")[1].split("Mean error")[0].splitlines()
    marked = [number for number, line in enumerate(table) if line.startswith(">")]
    floor = next(number for number, line in enumerate(table) if line.startswith("  says"))
    assert len(marked) == len(ours) == 2 and marked[0] == 2 and marked[-1] < floor
    low, high = ours[0].intervals["per"]
    assert f"±{(high - low) / 2:.3f}" in table[marked[0] + 1]


def test_text_is_wrapped_between_words_and_a_path_stays_whole(columns, capsys):
    path = "/a-folder/" + "x" * 120
    screen.say(f"written: {'word ' * 40}in {path}", "second")
    lines = capsys.readouterr().out.splitlines()
    assert f"  {path}" in lines and lines[-1] == "second"
    assert all(len(line) <= columns for line in lines if path not in line)


def test_the_line_of_progress_shows_tokens_per_second_of_a_long_run(columns):
    line = {"loss": 12.3456, "learning_rate": 2e-5, "gradient_norm": 123.4, "tokens_per_second": 12345.6}
    numbers = {"n": 1234, "total": 9999, "elapsed": 30_000, "ncols": columns, "postfix": run._progress(line)}
    shown = run.tqdm.format_meter(**numbers, bar_format=run.PROGRESS)
    assert len(shown) <= columns and "12,346 tokens/s" in shown and "loss 12.346" in shown


CODE = "from support import cli, screen; cli.run_script('x', lambda: screen.show_table('c', ['t' * 9] * 9, {}))"
ROWS = [("name " * 9, ["0.123\n±0.045"] * 12)]


def test_what_goes_to_a_file_has_no_colours_and_a_width_of_its_own(tmp_path):
    """Whatever the terminal is; and an ASCII log gets question marks."""
    environment = os.environ | {"COLUMNS": "300", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(ROWS)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "?0.045" in result.stdout and "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= screen.WIDEST


def test_nothing_but_the_screen_prints_tables():
    """One place: whoever prints a table calls screen.show_table."""
    own = [path for folder in (".", "support", "analysis") for path in (ROOT / folder).glob("*.py")]
    found = [path.name for path in own if re.search(r"^(from|import) rich", path.read_text(), re.MULTILINE)]
    assert found == ["screen.py"] and Path(screen.__file__).parent.name == "support"
