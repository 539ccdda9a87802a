"""Other corpora and other methods: what docs/own-data.md, l2_arctic.py and changing.md say, done as a user would."""

import json
from pathlib import Path
import re
import shutil

from conftest import ROOT, call, read_lines, script, settings
import pytest

from analysis import ablation, floors, report
import data
import evaluate
from support import cli
import train

L2_ARCTIC = ROOT / "docs" / "l2_arctic.py"


def tier(name, intervals):
    """A tier of a TextGrid; intervals: (seconds, text)."""
    lines = [f'    item [1]:\n        class = "IntervalTier"\n        name = "{name}"\n']
    for start, text in intervals:
        lines.append(f'        intervals [1]:\n xmin = {start} \n xmax = {start + 0.1} \n text = "{text}" \n')
    return "".join(lines)


def marks_of(word):
    """A word of scores.json as L2-ARCTIC would mark its phones."""
    marks = [f"{phone}0" for phone in word["phones"]]
    for label in word["mispronunciations"]:
        phone, said = word["phones"][label["index"]], label["pronounced-phone"]
        marks[label["index"]] = f"{phone},sil,d" if said == "<DEL>" else f"{phone},{said},s"
    return marks


def write_sentence(root, speaker, utterance, marks):
    for name in ("wav", "transcript", "annotation"):
        (root / speaker / name).mkdir(parents=True, exist_ok=True)
    (root / speaker / "wav" / f"{utterance.id}.wav").write_bytes(utterance.recording())
    (root / speaker / "transcript" / f"{utterance.id}.txt").write_text(utterance.text + "\n")
    words, phones, now = [(0.0, "sil")], [(0.0, "SIL")], 0.1
    for word, of_word in zip(utterance.words, marks, strict=True):
        words.append((now, word.text))
        for mark in of_word:
            phones.append((round(now, 1), mark))
            now += 0.1
    text = 'File type = "ooTextFile"\n' + tier("words", words) + tier("phones", phones) + tier("IPA", [(0.0, "x")])
    (root / speaker / "annotation" / f"{utterance.id}.TextGrid").write_text(text)


@pytest.fixture
def l2_arctic(tmp_path, corpus, utterances):
    """Eight sentences in L2-ARCTIC's layout: six of two speakers to train on, two of one to test."""
    records = json.loads((corpus / "resource" / "scores.json").read_text())
    for utterance, speaker in zip(utterances, ["ABA"] * 3 + ["BWC"] * 3 + ["NJS"] * 2):
        write_sentence(tmp_path / "l2", speaker, utterance, map(marks_of, records[utterance.id]["words"]))
    return tmp_path / "l2"


def test_l2_arctics_annotation_gives_the_phones_that_were_annotated(l2_arctic, utterances):
    read = data.read_corpus(l2_arctic, "train", reader=L2_ARCTIC) + data.read_corpus(
        l2_arctic, "test", reader=L2_ARCTIC
    )
    assert [(u.text, u.words, u.samples) for u in read] == [(u.text, u.words, u.samples) for u in utterances[:8]]
    assert {u.tasks for u in read} == {("MDD",)} and read[-1].speaker == "NJS"
    path = l2_arctic / "NJS" / "annotation" / f"{utterances[7].id}.TextGrid"
    words = [(0.0, "sp"), (0.1, "Bear"), (0.3, "it")]
    marks = [(0.0, "sil,AH0,a"), (0.1, "B,err,s"), (0.2, "EH1 , EH*, s"), (0.3, "IH0"), (0.4, "T,sil,d"), (0.5, "sp")]
    path.write_text(tier("words", words) + tier("phones", marks))
    *_, last = data.read_corpus(l2_arctic, "test", reader=L2_ARCTIC)
    assert [(w.text, " ".join(w.canonical), " ".join(w.heard), w.mispronounced) for w in last.words] == [
        ("Bear", "B EH", "AH <unk> EH*", 2),
        ("it", "IH T", "IH", 1),
    ]
    path.write_text("TextGrid")
    with pytest.raises(cli.InputError, match=f"NJS-{utterances[7].id}: .*has no tier of words"):
        data.read_corpus(l2_arctic, "test", reader=L2_ARCTIC)


def test_a_named_reader_trains_evaluates_and_is_never_run_unnamed(l2_arctic, checkpoint, monkeypatch, tmp_path):
    reader, ran = tmp_path / "mine.py", tmp_path / "ran"
    reader.write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n{L2_ARCTIC.read_text()}")
    sizes = "--epochs 1 --batch-size 2 --accumulation 1 --rank 4 --alpha 8 --validation 0.3".split()
    where = ["--model", checkpoint, "--data", l2_arctic, "--data-reader", reader]
    train.train(settings(monkeypatch, *where, *sizes))
    asked = "--adapter out --max-new-tokens 8".split()
    call(monkeypatch, evaluate, *asked, "--data-reader", reader)
    assert [line["id"][:3] for line in read_lines(Path("out/predictions.jsonl"))] == ["NJS"] * 2
    for again in (["--data-reader", reader], ["--data", l2_arctic, "--data-reader", reader]):
        call(monkeypatch, ablation, "silence", *asked, *again)
        call(monkeypatch, floors, "out/predictions.jsonl", *again)
        call(monkeypatch, report, "out", *again)
        assert Path("out/report.html").read_text().count("<audio ") == 2
    ran.unlink()
    for command, arguments in ((evaluate, asked), (floors, ["out/predictions.jsonl"]), (settings, ["--resume"])):
        with pytest.raises(cli.InputError, match=f"read by {reader}.*: give --data-reader {reader}"):
            command(monkeypatch, *arguments) if command is settings else call(monkeypatch, command, *arguments)
    call(monkeypatch, report, "out")
    assert f"give --data-reader {reader}" in Path("out/report.html").read_text() and not ran.exists()
    Path("empty.py").touch(), Path("cut.py").write_text("def read(")
    faults = {
        "none.py": "is no Python file",
        "empty.py": "has no function read",
        "cut.py": "cannot be run: SyntaxError",
    }
    for name, fault in faults.items():
        with pytest.raises(cli.InputError, match=f"--data-reader {name} {fault}"):
            data.read_corpus(l2_arctic, "train", reader=Path(name))


def test_the_short_reader_in_the_docs_takes_scores_words_or_both(tmp_path, utterances):
    text = (ROOT / "docs" / "own-data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "table.py").write_text(code)
    lines = [json.loads(line) for line in re.findall(r"^    (\{.*\})$", text, re.MULTILINE)]
    for utterance, line in zip(utterances, lines, strict=False):
        (tmp_path / line["file"]).write_bytes(utterance.recording())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = data.read_corpus(tmp_path, "train", reader=tmp_path / "table.py")
    assert [u.tasks for u in read] == [("APA",), ("MDD",)] and read[1].words[0].heard == ("IY", "T")
    del lines[0]["scores"]["total"]
    (tmp_path / "train.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1] | {"words": []}))
    with pytest.raises(cli.InputError, match="a.wav: scores accuracy.*must be .*total\n.*b.wav: .*neither scores"):
        data.read_corpus(tmp_path, "train", reader=tmp_path / "table.py")


TEXT = (ROOT / "docs" / "changing.md").read_text()
CHANGES = re.findall(r"`(\w+\.py)`\s+```\n(.*?)```\s+by\s+```\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("file, old, new", CHANGES, ids=["prompt", "loss"])
def test_the_changes_in_the_docs_can_be_made_and_train(where, monkeypatch, tmp_path, file, old, new):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    before, rest = (tmp_path / file).read_text().split(old.removesuffix("\n"))
    (tmp_path / file).write_text(before + new.removesuffix("\n") + rest)
    sizes = "--limit 4 --epochs 1 --batch-size 4 --accumulation 2 --rank 4 --alpha 8 --dropout 0".split()
    result = script(tmp_path / "train.py", *where, *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if file == "model.py":
        train.train(settings(monkeypatch, *where, *sizes, "--output", "unchanged"))
        (changed,), (unchanged,) = (read_lines(Path(folder) / "log.jsonl") for folder in ("out", "unchanged"))
        assert 0 < changed["loss"] < unchanged["loss"]
    else:
        with pytest.raises(cli.InputError, match="trained with other prompts"):
            evaluate.evaluations(evaluate.ModelSettings(adapter=Path("out")))
