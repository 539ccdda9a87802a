"""The reader in docs/own-data.md, as a user would put it into data.py."""

from difflib import SequenceMatcher
import json
import re
import sys

from conftest import ROOT, settings
import pytest

from analysis import ablation, floors, report
import data
import evaluate
from support import cli
import train

SCORES = {"accuracy": 8, "fluency": 9, "prosodic": 7, "total": 8}
WORDS = [{"text": "CALL", "canonical": "K AO1 L", "heard": "K AA L"}, {"text": "IT", "canonical": "IH T", "heard": ""}]


@pytest.fixture
def reader(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.DOTALL)
    assert len(code.split("def read_table")[1].splitlines()) <= 30
    monkeypatch.setattr(data, "SequenceMatcher", SequenceMatcher, raising=False)
    before = set(vars(data))
    exec(compile(code, "own-data.md", "exec"), vars(data))
    monkeypatch.setattr(data, "read_folder", data.read_table)
    yield
    for name in set(vars(data)) - before:
        delattr(data, name)


@pytest.fixture
def folder(tmp_path, utterances, reader):
    """Six utterances of three speakers: scores alone, phones alone, both, twice."""
    root = tmp_path / "mine"
    root.mkdir()
    lines = []
    for i, kinds in enumerate(["s", "w", "sw"] * 2):
        (root / f"{i}.wav").write_bytes(utterances[i].recording())
        line = {"file": f"{i}.wav", "speaker": f"s{i % 3}", "text": "CALL IT", "age": "unknown"}
        lines.append(line | ({"scores": SCORES} if "s" in kinds else {}) | ({"words": WORDS} if "w" in kinds else {}))
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_an_utterance_gives_an_example_for_each_kind_of_label_that_it_has(folder):
    lines = (folder / "train.jsonl").read_text().replace('"CALL IT"', '"CALL\u2028IT"')  # valid JSON, and one line
    (folder / "train.jsonl").write_text("\ufeff" + lines)
    read = data.read_corpus(folder, "train")
    assert {u.text for u in read} == {"CALL\u2028IT"}
    assert [u.tasks for u in read] == [("APA",), ("MDD",), ("APA", "MDD")] * 2
    assert read[0].scores == SCORES and read[1].scores is None
    assert [(w.canonical, w.heard, w.mispronounced) for w in read[1].words] == [
        (("K", "AO", "L"), ("K", "AA", "L"), 1),
        (("IH", "T"), (), 2),
    ]
    assert "6 utterances of 3 speakers" in data.describe(
        read
    ) and "20 canonical phones, 12 mispronounced" in data.describe(read)


@pytest.mark.parametrize("labels", ["both", "scores", "words"])
def test_a_table_is_trained_on_and_evaluated_and_every_command_takes_it(
    folder, checkpoint, tmp_path, monkeypatch, labels, capsys
):
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    kept = [line for line in lines if labels == "both" or labels in line]
    kept = [
        {key: line[key] for key in line if labels == "both" or key not in {"scores", "words"} - {labels}}
        for line in kept
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    sizes = "--epochs 1 --batch-size 2 --accumulation 1 --rank 4 --alpha 8 --validation 0.3".split()
    out = tmp_path / "out"
    train.train(settings(monkeypatch, "--model", checkpoint, "--data", folder, *sizes, "--output", out))

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments), "--split", "train"])
        command.main()

    asked = ["--adapter", out, *"--max-new-tokens 8 --scoring greedy expected".split()]
    call(evaluate, *asked)
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    examples = sum(("scores" in line) + ("words" in line) for line in kept)
    assert len(answers) == examples
    numbers = json.loads((out / "metrics.json").read_text())
    assert (numbers["per"] is None) == (labels == "scores") and (numbers["apa_unparsed"] is None) == (labels == "words")
    capsys.readouterr()
    call(floors, out / "predictions.jsonl")
    assert ("\n  pauses and energy " in capsys.readouterr().out) == (labels != "words")
    call(report, out)
    page = (out / "report.html").read_text()
    assert page.count("<audio ") == len(kept) and (out / "confusion.png").exists() == (labels != "scores")
    for how in ("silence", "swap"):
        call(ablation, how, *asked)
        assert (out / how / "predictions.jsonl").read_text().count("\n") == examples


@pytest.mark.parametrize(
    "line, fault",
    [
        ({"file": "0.wav", "speaker": "s", "text": "IT"}, "neither scores nor words"),
        ({"file": "0.wav", "speaker": "s", "text": "IT", "scores": SCORES | {"total": 8.5}}, "scores.total"),
        ({"file": "none.wav", "speaker": "s", "text": "IT", "scores": SCORES}, "none.wav cannot be read"),
    ],
)
def test_a_bad_line_is_named(folder, line, fault):
    with open(folder / "train.jsonl", "a") as file:
        print(json.dumps(line), file=file)
    with pytest.raises(cli.InputError, match=f"line 7 of train.jsonl: .*{fault}"):
        data.read_corpus(folder, "train")
