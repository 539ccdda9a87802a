"""What is printed fits the screen, and nothing in it from outside moves the cursor or begins a line of its own."""

from conftest import script
import pytest
from records import one_hot, records

import evaluate
from support import cli

OUTSIDE = "id\x1b[2J\x07\x9b1m\rx\ny\u202ez\udc80"
SHOWN = r"id\x1b[2J\x07\x9b1m\rx\ny\u202ez\udc80"


def test_control_characters_from_outside_are_printed_as_text(capsys):
    def fail():
        raise cli.InputError(f"{OUTSIDE} is wrong")

    cli.say(OUTSIDE)
    cli.show_table(OUTSIDE, [OUTSIDE], [(OUTSIDE, [OUTSIDE.replace("\n", "")])], numbers=False)
    with pytest.raises(SystemExit):
        cli.run_script("x.py", fail)
    out, err = capsys.readouterr()
    assert (
        out.count(SHOWN) == 4
        and out.count(SHOWN.replace(r"\n", "")) == 1
        and not cli.CONTROL.search(out.replace("\n", ""))
    )
    assert err == f"x.py: error: {SHOWN} is wrong\n"


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_no_line_is_wider_than_the_screen_and_every_number_is_whole(columns, monkeypatch, capsys):
    monkeypatch.setattr(cli, "width", lambda stream=None: columns)
    lines = records(12, speakers=4)
    for line in lines[::2]:
        line |= {"scores": one_hot(3, low=4), "tokens": 9}
    ours, floors = evaluate.rows_of(lines, "epoch-3", "lora, epoch 3"), [evaluate.copying_floor(lines)]
    evaluate.show(ours, floors)
    cli.say(f"{'word ' * 40}in /{'x' * 120}", "second")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"  /{'x' * 120}", "second"] and max(map(len, printed[:-2])) <= max(columns, 80)
    for name, texts in evaluate.tables(ours, floors)[0][2]:
        numbers = [text.split("\n")[0] for text in texts]
        (place,) = (number for number, line in enumerate(printed) if line.split()[-9:] == numbers)
        assert printed[place].startswith(">") == name.startswith("this run")
    low, high = ours[0].intervals["per"]
    assert any(f"±{(high - low) / 2:.3f}" in line for line in printed)


def test_without_a_terminal_progress_is_a_line_for_every_twentieth(monkeypatch, capsys):
    monkeypatch.setattr(cli, "MOMENT", 1e-9)
    with cli.Progress(total=200, desc="reading") as bar:
        for _ in range(200):
            cli.say("a note")
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert [int(line.removeprefix("reading:").split("%")[0]) for line in lines[:-1]] == [*range(5, 101, 5)]
    assert lines[-1] == "" and max(map(len, lines)) <= cli.WIDEST


def test_what_goes_to_a_file_has_no_colours_and_a_width_of_its_own(tmp_path):
    table = {"columns": ["t" * 9] * 9, "rows": [("name " * 9, ["0.123\n±0.045"] * 9)], "own": 1}
    code = f"from support import cli; cli.run_script('x', lambda: cli.show_table('c', **{table}))"
    result = script("-c", code, cwd=tmp_path, environment={"COLUMNS": "300", "PYTHONIOENCODING": "ascii"})
    assert result.stdout.count("?0.045") == 9 and "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= cli.WIDEST
