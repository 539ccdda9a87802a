import argparse
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from conftest import ROOT, greedy, script
from processes import Process

import data
import evaluate
import metrics
import model as models
import prompts
import tables
from support import cli, files

METRIC_KEYS = {f"{name}_{kind}" for name in prompts.SCORES for kind in ("pcc", "pvalue", "mae")} | {
    "wer",
    "per",
    "detection_precision",
    "detection_recall",
    "detection_f1",
    "phone_agreement_precision",
    "phone_agreement_recall",
    "phone_agreement_f1",
    "apa_unparsed",
    "mdd_unparsed",
    "apa_truncated",
    "mdd_truncated",
}


def records(count=6):
    """Predictions of a system that is one point off in accuracy and misses the last phone."""
    lines = []
    for i in range(count):
        scores = {"accuracy": i % 10, "fluency": 9 - i % 10, "prosodic": 5, "total": i % 3}
        output = prompts.apa_target(scores | {"accuracy": i % 10 + 1})
        lines.append({"id": f"u{i}", "task": "APA", "output": output, "reference": scores, "truncated": False})
        reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
        output = prompts.mdd_target("WE SEE", ["W", "IH", "S"])
        lines.append({"id": f"u{i}", "task": "MDD", "output": output, "reference": reference, "truncated": i == 0})
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_row_of_the_papers_table_has_a_number_for_each_column():
    """The numbers themselves: tests/test_readme.py."""
    assert {len(row) for row in tables.PAPER.values()} == {len(tables.TABLE_3)}


def test_scoring_counts_what_was_unparsed_and_cut_off():
    lines = records()
    lines[0]["output"] = "no scores today"
    lines[3]["output"] = '{"word_transcript": "WE SE'
    numbers, reasons = evaluate.score(lines)
    assert numbers.keys() >= METRIC_KEYS
    assert numbers["apa_unparsed"] == numbers["mdd_unparsed"] == numbers["mdd_truncated"] == 1 / 6
    assert numbers["apa_truncated"] == 0
    assert numbers["accuracy_pcc"] == pytest.approx(1) and numbers["accuracy_mae"] == 1
    assert numbers["fluency_pcc"] == pytest.approx(1) and numbers["fluency_mae"] == 0
    assert math.isnan(numbers["prosodic_pcc"]) and reasons == {"prosodic_pcc": "all 5 predicted scores are 5"}
    assert numbers["per"] == (5 * 1 + 4) / 24 and numbers["wer"] == 2 / 12
    assert numbers["detection_recall"] == 1 and numbers["detection_precision"] == 6 / 14


def test_the_floor_is_what_copying_the_canonical_phones_gives():
    floor = evaluate.canonical_floor(records()).numbers
    assert floor["per"] == 1 / 4 and floor["detection_recall"] == 0 and floor["wer"] == 0


def test_a_number_is_marked_when_within_005_of_the_papers():
    paper = dict(zip(tables.TABLE_3, tables.PAPER["lora", 3]))
    cells = tables.cells(paper | {"per": 0.114 + 0.051, "wer": 0.14 - 0.049}, tables.TABLE_3, near=paper)
    assert cells[0] == "0.656*" and cells[4] == "0.091*" and cells[5] == "0.165"


@pytest.mark.parametrize(
    "label, settings, row",
    [
        ("base", {"strategy": "unfreeze", "epoch": 2}, ("base", 0)),
        ("epoch-2", {"strategy": "lora", "epoch": 2}, ("lora", 2)),
        ("epoch-4", {"strategy": "unfreeze", "epoch": 4}, ("unfreeze", 4)),
        ("epoch-9", {"strategy": "lora", "epoch": 9}, ("lora", 3)),
        ("epoch-2", {"strategy": "full", "epoch": 2}, ("lora", 2)),
        ("predictions", {}, ("lora", 3)),
    ],
)
def test_a_run_is_compared_with_the_papers_row_of_its_epoch(label, settings, row):
    assert evaluate.Evaluation(label, Path("out"), None, settings).paper_row == row


def test_a_saved_file_is_scored_without_loading_torch(tmp_path):
    write(tmp_path / "predictions.jsonl", records())
    code = (
        "import runpy, sys; sys.argv = ['evaluate.py', '--predictions', 'predictions.jsonl'];"
        f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'evaluate.py')!r}, run_name='__main__');"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    result = script("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved.keys() >= METRIC_KEYS and saved["prosodic_pcc"] is None and saved["per"] == 1 / 4
    assert (tmp_path / "figure5.png").read_bytes().startswith(b"\x89PNG")
    assert "no prosodic_pcc: all 6 predicted scores are 5" in result.stdout
    assert "this run, predictions" in result.stdout and "paper, lora, epoch 3" in result.stdout


def changed(number, **changes):
    """The records above, one of them changed, as the content of a file."""
    lines = records()
    lines[number] |= changes
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def relabelled(number, **changes):
    return changed(number, reference=records()[number]["reference"] | changes)


def distributed(total):
    """The records above with probabilities, those of the total score as given."""
    certain = [0.0] * 10 + [1.0]
    return changed(0, scores=dict.fromkeys(prompts.SCORES, certain) | {"total": total})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n", "is not UTF-8"),
        (bytes(100), "line 1 of"),
        (b"[]\n", "line 1 of"),
        (b"[" * 100_000, "line 1 of"),
        (changed(0)[:-20], "line 12 of"),
        (changed(0).replace(b"\n", b"\n\n", 1), "line 2 of"),
        (changed(1).replace(b'"id": "u0", ', b""), "line 1 of .*id is missing"),
        (changed(2, id=3), "line 3 of .*id 3"),
        (changed(0, task="ASR"), "line 1 of .*ASR"),
        (changed(1, output=None), "line 2 of .*output None"),
        (changed(0, speaker=7), "line 1 of .*speaker 7"),
        (changed(0, truncated="yes"), "line 1 of .*truncated 'yes'"),
        (changed(0, tokens=-1), "line 1 of .*tokens -1"),
        (changed(1, output="\ud800"), "line 2 of"),
        (changed(0, reference={"accuracy": 1}), "line 1 of .*fluency is missing"),
        (relabelled(0, total=11), "line 1 of .*total 11"),
        (relabelled(0, total=True), "line 1 of .*total True"),
        (relabelled(0, total=math.nan), "line 1 of .*total nan"),
        (relabelled(1, heard="W"), "line 2 of .*heard 'W'"),
        (relabelled(1, heard=["W", 3]), "line 2 of .*heard.1 3"),
        (relabelled(1, heard=["W IH"]), "line 2 of .*heard.0 'W IH'"),
        (relabelled(1, canonical=["W", ""]), "line 2 of .*canonical.1 ''"),
        (relabelled(1, heard=["\udc00"]), "line 2 of"),
        (distributed([1.0]), "line 1 of .*total"),
        (distributed([-5.0, 6.0] + [0.0] * 9), "line 1 of .*total.0 -5.0"),
        (distributed([1e9] + [0.0] * 10), "line 1 of .*total"),
        (distributed([0.5] * 11), "line 1 of .*sum to 5.5"),
        (distributed([math.nan] * 11), "line 1 of .*nan"),
        (changed(2, id="u0"), "line 3 of .*'u0' .APA., which line 1 does: remove one"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(cli.InputError, match=message) as error:
        evaluate.read_predictions(tmp_path / "bad.jsonl")
    assert len(str(error.value).splitlines()) == 1


def test_a_null_in_a_prediction_is_as_good_as_nothing(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(changed(0, scores=None, truncated=None, tokens=None, speaker=None))
    first, *_ = evaluate.read_predictions(tmp_path / "p.jsonl")
    assert not {"scores", "truncated", "tokens", "speaker"} & first.keys()


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_characters_that_no_file_or_terminal_shows_do_not_end_the_evaluation(tmp_path):
    """Half a surrogate pair, which JSON can write, makes an answer unparsed; other control characters stay."""
    lines = records()
    lines[1]["output"] = r'{"word_transcript": "WE SEE", "phoneme_transcript": "W \ud800 S"}'
    lines[3]["output"] = r'{"word_transcript": "WE \udfff", "phoneme_transcript": "W"}'
    lines[5]["output"] = r'{"word_transcript": "W\u0000E", "phoneme_transcript": "W \u0000 \u001b[31m"}'
    write(tmp_path / "predictions.jsonl", lines)
    arguments = ["--predictions", "predictions.jsonl", "--report", "report.html"]
    code, text = Process("evaluate", arguments, tmp_path).wait()
    assert code == 0 and "> \0" in text and "> \x1b[M" in text, text
    phones = (tmp_path / "phones.tsv").read_text(encoding="utf-8")
    assert "\0:1" in phones and "\x1b[M:1" in phones
    assert json.loads((tmp_path / "metrics.json").read_text())["mdd_unparsed"] == 2 / 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate"),
        (["--predictions", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--adapter", "nowhere"], "nowhere holds no adapter"),
        (["--adapter", "nowhere", "--predictions", "x", "--batch-size", "3"], "leave out --adapter --batch-size"),
        (["--summarise", "out", "--adapter", "out"], "--summarise reads metrics.json: leave out --adapter"),
        (["--summarise", "out", "--output", "x"], "--summarise reads metrics.json: leave out --output"),
        (["--base", "--epochs", "2"], "--epochs 2 chooses among those of a run: give --adapter as well"),
        (["--adapter", "out", "--predictions", "x"], "--predictions scores a saved file: leave out --adapter"),
        (["--base", "--batch-size", "0"], "--batch-size: 0 is not a whole number from 1"),
        (["--base", "--limit", "-1"], "--limit: -1 is not a whole number from 1"),
        (["--base", "--max-new-tokens", "1e3"], "--max-new-tokens: 1e3 is not a whole number from 1"),
        (["--base", "--output", "x" * 300], "File name too long"),
        (
            ["--base", "--model", "nowhere"],
            "model nowhere is not a folder here, revision refs/pr/70 of it is not whole",
        ),
    ],
)
def test_a_users_mistake_ends_with_2_and_one_line(tmp_path, arguments, message):
    code, text = Process("evaluate", arguments, tmp_path).wait()
    assert code == 2 and text.startswith("evaluate.py: error: ") and message in text and len(text.splitlines()) == 1


def test_every_epoch_and_the_base_give_a_row_and_files(run, corpus):
    arguments = ["--adapter", "out/", "--epochs", "all", "--base", "--limit", 5, "--batch-size", 2]
    code, text = Process("evaluate", [*arguments, "--max-new-tokens", 30], run[0]).wait()
    assert code == 0, text
    for label in ("base", "epoch-1", "epoch-2"):
        assert f"this run, {label}" in text
        lines = evaluate.read_predictions(run[0] / "out" / label / "predictions.jsonl")
        utterances = data.read_corpus(corpus, "test", limit=5)
        for utterance in utterances:
            (apa,) = (line for line in lines if line["id"] == utterance.id and line["task"] == "APA")
            (mdd,) = (line for line in lines if line["id"] == utterance.id and line["task"] == "MDD")
            assert apa["reference"] == utterance.scores and apa["tokens"] <= 30
            assert mdd["reference"] == {
                "word_transcript": utterance.text,
                "canonical": utterance.canonical,
                "heard": utterance.heard,
            }
        assert len(lines) == 10
        saved = json.loads((run[0] / "out" / label / "metrics.json").read_text())
        again = evaluate.score(lines)[0]
        numbers = {key: value for key, value in saved.items() if not key.endswith(("_low", "_high"))}
        assert numbers == {"evaluated": label} | {k: None if math.isnan(v) else v for k, v in again.items()}


def test_an_adapter_folder_itself_and_a_single_epoch_can_be_named(run):
    (run[0] / "out" / "epoch-3.unfinished").mkdir(exist_ok=True)  # what a run leaves that was killed while saving
    (run[0] / "out" / "epoch-3.unfinished" / "adapter_config.json").touch()
    ((folder, settings),) = evaluate.adapter_folders(run[0] / "out" / "epoch-1", None)
    assert folder.name == "epoch-1" and settings["epoch"] == 1
    assert [f.name for f, _ in evaluate.adapter_folders(run[0] / "out", "last")] == ["epoch-2"]
    assert [f.name for f, _ in evaluate.adapter_folders(run[0] / "out", "1")] == ["epoch-1"]
    assert [f.name for f, _ in evaluate.adapter_folders(run[0] / "out", "all")] == ["epoch-1", "epoch-2"]
    with pytest.raises(cli.InputError, match="is one epoch: leave out --epochs all"):
        evaluate.adapter_folders(run[0] / "out" / "epoch-1", "all")
    with pytest.raises(cli.InputError, match="no epoch '7': there are epoch-1, epoch-2"):
        evaluate.adapter_folders(run[0] / "out", "7")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--strategy", "full"],
        ["--strategy", "unfreeze", "--rank", 2],
        ["--quantize", "nf4", "--rank", 2],
        ["--quantize", "nf4", "--speech-adapter", "continue"],
    ],
)
def test_what_was_trained_is_what_is_evaluated(checkpoint, corpus, tmp_path, arguments):
    where = ["--model", checkpoint, "--data", corpus, "--limit", 4, "--epochs", 3, "--learning-rate", 1e-2]
    code, text = Process("train", [*where, *arguments], tmp_path).wait()
    assert code == 0, text
    code, text = Process("evaluate", ["--adapter", "out", "--limit", 3, "--max-new-tokens", 20], tmp_path).wait()
    chosen = dict(zip(arguments[::2], arguments[1::2]))
    strategy = chosen.get("--strategy", "lora")
    assert code == 0 and f"paper, {'unfreeze' if strategy == 'unfreeze' else 'lora'}, epoch 3" in text, text
    written = evaluate.read_predictions(tmp_path / "out" / "predictions.jsonl")
    way, quantize = chosen.get("--speech-adapter", "merge"), chosen.get("--quantize")
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", way, quantize)
    untrained = greedy(model, data.read_corpus(corpus, "test", limit=3), "MDD", 20)
    models.load_trained(model, tmp_path / "out" / "epoch-3", strategy)
    expected = greedy(model, data.read_corpus(corpus, "test", limit=3), "MDD", 20)
    assert [line["output"] for line in written if line["task"] == "MDD"] == [text for text, _, _ in expected]
    assert expected != untrained
    folder = tmp_path / "out" / "epoch-3"
    assert [path for path, _ in evaluate.adapter_folders(folder, None)] == [folder]


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


def evaluated(folder, **numbers):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"evaluated": "epoch-3", "utterances": 20, **numbers}))
    return folder


def test_several_runs_are_summarised_by_mean_standard_deviation_and_range(monkeypatch, tmp_path, capsys):
    runs = [
        evaluated(tmp_path / f"seed-{i}", per=per, accuracy_pcc=pcc)
        for i, (per, pcc) in enumerate([(0.1, 0.5), (0.2, None), (0.6, 0.7)])
    ]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--summarise", *map(str, runs)])
    evaluate.main()
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in map(str.split, printed.splitlines()) if cells}
    std = ((0.2**2 + 0.1**2 + 0.3**2) / 2) ** 0.5
    assert rows["per"] == ["0.300", f"{std:.3f}", "0.100", "0.600", "3"]
    assert rows["accuracy_pcc"] == ["0.600", "0.141", "0.500", "0.700", "2"]
    assert "3 runs, 20 utterances each" in printed and "utterances" not in rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"utterances": 10}, "evaluated on different utterances: .*one on 20 utterances, .*two on 10"),
        (None, "two/metrics.json cannot be read.*evaluate the run first"),
        ({"utterances": "20"}, "two/metrics.json: utterances '20'.*evaluate the run first"),
        ({"per": "low"}, "two/metrics.json: per 'low'"),
        ({"per": math.nan}, "two/metrics.json: per nan"),
        ({"per": 1e308}, "two/metrics.json: per 1e.308"),
    ],
)
def test_runs_that_cannot_be_compared_are_not_summarised(tmp_path, change, message):
    runs = [evaluated(tmp_path / "one"), tmp_path / "two"]
    if change:
        evaluated(runs[1], **change)
    with pytest.raises(cli.InputError, match=message):
        tables.summarise(runs)
    with pytest.raises(cli.InputError, match="is one run: a spread needs two or more"):
        tables.summarise(runs[:1])
    with pytest.raises(cli.InputError, match="names .*one more than once"):
        tables.summarise([runs[0], runs[0] / "metrics.json"])


@pytest.mark.parametrize("trained", models.SPEECH_ADAPTERS)
@pytest.mark.parametrize("base", [True, False])
def test_the_unmodified_model_has_its_speech_adapter_and_no_control_token(
    monkeypatch, run, corpus, tmp_path, trained, base
):
    folder, settings = evaluate.adapter_folders(run[0] / "out", "last")[0]
    evaluation = evaluate.Evaluation("x", tmp_path, None if base else folder, settings | {"speech_adapter": trained})
    seen = []
    load_base, generate = models.load_base, models.SpeechModel.generate
    monkeypatch.setattr(models, "load_base", lambda *args: seen.append(args[4]) or load_base(*args))
    monkeypatch.setattr(models.SpeechModel, "generate", lambda *args: seen.append(args[5]) or generate(*args))
    utterances = data.read_corpus(corpus, "test", limit=1)
    arguments = how()
    evaluate.generate(evaluation, utterances, arguments)
    assert seen == ["merge" if base else trained] + [not base] * 2


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("base", [True, False])
def test_the_unmodified_model_is_not_quantised_though_the_adapter_was_trained_so(monkeypatch, tmp_path, base, quantize):
    settings = {"epoch": 1, "strategy": "lora", "speech_adapter": "merge", "model": "tiny", "quantize": quantize}
    asked = []
    monkeypatch.setattr(models, "load_base", lambda *args: asked.append(args[5]) or SimpleNamespace(eval=list))
    monkeypatch.setattr(models, "load_trained", lambda *args: None)
    evaluate.load(evaluate.Evaluation("x", tmp_path, None if base else tmp_path, settings), how())
    assert asked == [None if base else quantize]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "settings.json: "),
        ("[]", "settings.json: "),
        ("[" * 100_000, "settings.json: "),
        ({"epoch": None}, "epoch None"),
        ({"epoch": "1"}, "epoch '1'"),
        ({"epoch": True}, "epoch True"),
        ({"epoch": 10**30}, "epoch 10000"),
        ({"strategy": "foo"}, "strategy 'foo'.*'unfreeze'"),
        ({"speech_adapter": "foo"}, "speech_adapter 'foo'.*'merge'"),
        ({"model": 3}, "model 3"),
        ({"data": ["x"]}, "data .'x'"),
        ({"data_revision": 3}, "data_revision 3"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"quantize": "nf5"}, "quantize 'nf5'"),
    ],
)
def test_settings_that_train_py_did_not_write_are_refused(run, tmp_path, content, message):
    if isinstance(content, dict):
        content = json.dumps(json.loads((run[0] / "out" / "epoch-1" / "settings.json").read_text()) | content)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(cli.InputError, match=message) as error:
        evaluate.adapter_folders(tmp_path, None)
    assert len(str(error.value).splitlines()) == 1


def test_the_choices_that_are_accepted_beside_an_adapter_are_those_of_training():
    fields = evaluate.TrainingSettings.model_fields
    assert get_args(fields["strategy"].annotation) == tuple(models.STRATEGIES)
    assert get_args(fields["speech_adapter"].annotation) == models.SPEECH_ADAPTERS


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "missing or marks 0 epochs.*--validation"),
        ('{"epoch": 1, "best": false}\n', "marks 0 epochs"),
        ('{"epoch": 1, "best": true}\n{"epoch": 2, "best": true}\n', "marks 2 epochs"),
        ('{"epoch": 1, "best": tr', "line 1 of .*validation.jsonl"),
        ('{"epoch": "1", "best": true}\n', "line 1 of .*epoch '1'"),
        ('{"epoch": 1, "best": 1}\n', "line 1 of .*best 1"),
        ("[]\n", "line 1 of"),
        ("\0", "line 1 of"),
    ],
)
def test_the_best_epoch_is_read_from_what_validation_wrote_or_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "validation.jsonl").write_text(content)
    with pytest.raises(cli.InputError, match=message):
        evaluate.best_epoch(tmp_path)


def test_a_corpus_without_a_train_part_is_evaluated(monkeypatch, run, corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("train"))
    where = ["--adapter", run[0] / "out", "--output", tmp_path / "out", "--data", tmp_path / "corpus"]
    main(monkeypatch, *where, "--limit", 2, "--max-new-tokens", 2)
    assert "says everything right" in capsys.readouterr().out
    assert (tmp_path / "out" / "metrics.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def how(**changes):
    """What generate() takes of the command line."""
    chosen = {
        "model": None,
        "revision": None,
        "dtype": None,
        "attention": None,
        "batch_size": 2,
        "max_new_tokens": 2,
        "scoring": ["greedy"],
        "resume": False,
    }
    return argparse.Namespace(**chosen | changes)


@pytest.fixture
def evaluation(run, tmp_path):
    folder, settings = evaluate.adapter_folders(run[0] / "out", "last")[0]
    return evaluate.Evaluation("epoch-2", tmp_path / "out", folder, settings)


def lines_of(evaluation):
    return evaluate.read_predictions(evaluation.output / "predictions.jsonl")


def test_outputs_are_in_the_corpus_order_whatever_the_batches_are(evaluation, corpus, monkeypatch):
    utterances = data.read_corpus(corpus, "test", limit=9)
    monkeypatch.setattr(evaluate, "WINDOW", 2)
    texts = []
    for size in (1, 2, 9):
        evaluate.generate(evaluation, utterances, how(batch_size=size, max_new_tokens=12))
        lines = lines_of(evaluation)
        assert [(line["id"], line["task"]) for line in lines] == [(u.id, t) for u in utterances for t in prompts.TASKS]
        assert [line["speaker"] for line in lines[::2]] == [u.speaker for u in utterances]
        texts.append([line["output"] for line in lines])
    assert texts[0] == texts[1] == texts[2]


def test_batches_hold_utterances_of_similar_length_and_audio_is_embedded_once(evaluation, corpus, monkeypatch):
    utterances, batches, embedded = data.read_corpus(corpus, "test", limit=8), [], []
    generate, embed = models.SpeechModel.generate, models.SpeechModel.embed_audio
    monkeypatch.setattr(
        models.SpeechModel, "generate", lambda m, batch, *a: batches.append(batch) or generate(m, batch, *a)
    )
    monkeypatch.setattr(models.SpeechModel, "embed_audio", lambda m, f: embedded.append(len(f)) or embed(m, f))
    evaluate.generate(evaluation, utterances, how(scoring=["greedy", "expected"]))
    lengths = [utterance.samples for batch in batches[::2] for utterance in batch]
    assert lengths == sorted(u.samples for u in utterances) and embedded == [1] * 8


def test_lines_of_another_evaluation_are_not_gone_on_with(evaluation, corpus, monkeypatch):
    """The part file is kept up to the first line that answers something else; a broken line is refused."""
    utterances = data.read_corpus(corpus, "test", limit=4)
    evaluate.generate(evaluation, utterances, how())
    file = evaluation.output / "predictions.jsonl"
    whole, part = file.read_text(), file.with_name("predictions.jsonl.part")
    lines = whole.splitlines(keepends=True)
    for foreign in (lines[2].replace('"speaker": "', '"speaker": "x'), lines[2].replace('"total": ', '"total": 0.')):
        assert foreign != lines[2]
        part.write_text("".join([*lines[:2], foreign, *lines[3:]]))
        evaluate.generate(evaluation, utterances, how(resume=True))
        assert file.read_text() == whole
    for broken in ("{\n", lines[0], "\0\n", '{"id": "u", "task": "APA"}\n'):
        part.write_text("".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(cli.InputError, match="--resume: line 3 of .*leave out --resume"):
            evaluate.generate(evaluation, utterances, how(resume=True))
    assert file.read_text() == whole


@pytest.mark.parametrize("cut", [0, 1, 30, 10_000])
def test_a_stopped_evaluation_goes_on_to_the_same_file(evaluation, corpus, monkeypatch, cut):
    """The part file ends after some lines, with a line that was cut off, or with an utterance that lacks a task."""
    utterances = data.read_corpus(corpus, "test", limit=6)
    monkeypatch.setattr(evaluate, "WINDOW", 1)
    evaluate.generate(evaluation, utterances, how())
    file = evaluation.output / "predictions.jsonl"
    whole, part = file.read_text(), file.with_name("predictions.jsonl.part")
    four = "".join(whole.splitlines(keepends=True)[:9])
    part.write_text(four[: len(four) - cut] if cut < 10_000 else "")
    file.unlink()
    written, generate = [], models.SpeechModel.generate
    monkeypatch.setattr(models.SpeechModel, "generate", lambda m, b, *a: written.extend(b) or generate(m, b, *a))
    evaluate.generate(evaluation, utterances, how(resume=True))
    assert file.read_text() == whole and not part.exists()
    assert len(written) == 2 * (6 if cut == 10_000 else 2)
    evaluate.generate(evaluation, utterances, how(resume=True))
    assert len(written) == 2 * (6 if cut == 10_000 else 2)  # nothing left to do


def test_outputs_of_other_settings_are_not_gone_on_with(evaluation, corpus):
    utterances = data.read_corpus(corpus, "test", limit=2)
    evaluate.generate(evaluation, utterances, how())
    for chosen, changes in ((utterances, {"max_new_tokens": 3}), (utterances[:1], {})):
        with pytest.raises(cli.InputError, match="--resume: the outputs in .* are of another model, corpus or setting"):
            evaluate.generate(evaluation, chosen, how(resume=True, **changes))
    for broken in ("{", "[]", "", "\0"):
        (evaluation.output / "predictions.settings.json").write_text(broken)
        with pytest.raises(cli.InputError, match="predictions.settings.json"):
            evaluate.generate(evaluation, utterances, how(resume=True))


# ----------------------------------------------------------------------------------------------------------------------
# What is written, and what is left alone


def symlink_to_nothing(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "name, make",
    [
        (name, make)
        for name in (*evaluate.SCORED, *evaluate.GENERATED)
        for make in (Path.mkdir, Path.touch, symlink_to_nothing)
        if (name, make) != ("predictions.settings.json", Path.touch)  # the mark of an earlier evaluation
    ],
)
def test_what_something_else_wrote_is_not_replaced(monkeypatch, run, tmp_path, name, make):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    monkeypatch.setattr(evaluate, "evaluate", None)
    with pytest.raises(cli.InputError, match=f"{name} would be replaced.*another --output"):
        main(monkeypatch, "--adapter", run[0] / "out", "--output", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [name]


def test_a_saved_file_is_scored_twice_beside_it_and_never_overwritten(monkeypatch, tmp_path):
    content = write(tmp_path / "predictions.jsonl", records()).read_bytes()
    for _ in range(2):
        main(monkeypatch, "--predictions", tmp_path / "predictions.jsonl")
        assert (tmp_path / "predictions.jsonl").read_bytes() == content
    (tmp_path / "phones.tsv").write_bytes(content)
    with pytest.raises(cli.InputError, match="phones.tsv would be replaced"):
        main(monkeypatch, "--predictions", tmp_path / "phones.tsv")
    assert (tmp_path / "phones.tsv").read_bytes() == content


def test_metrics_of_something_else_are_no_mark_of_an_evaluation(monkeypatch, tmp_path):
    write(tmp_path / "predictions.jsonl", records())
    (tmp_path / "metrics.json").write_text('{"utterances": 3, "accuracy": 0.5}')
    with pytest.raises(cli.InputError, match="metrics.json would be replaced"):
        main(monkeypatch, "--predictions", tmp_path / "predictions.jsonl")


def test_a_second_evaluation_into_a_folder_is_refused_while_the_first_is_running(run, tmp_path):
    arguments = ["--adapter", run[0] / "out", "--limit", 1, "--max-new-tokens", 1, "--output", tmp_path / "out"]
    with files.lock(tmp_path / "out", "evaluate", "--output"):
        (tmp_path / "out" / "predictions.settings.json").write_text("{}")
        code, text = Process("evaluate", [*arguments, "--resume"], tmp_path).wait()
    assert code == 2 and len(text.splitlines()) == 1
    assert str(os.getpid()) in text and "another --output" in text
    assert (tmp_path / "out" / "predictions.settings.json").read_text() == "{}"
    code, text = Process("evaluate", arguments, tmp_path).wait()
    assert code == 0, text


def test_an_evaluation_leaves_alone_what_training_is_writing(monkeypatch, tmp_path):
    write(tmp_path / "predictions.jsonl", records())
    (tmp_path / "epoch-3.unfinished").mkdir()
    main(monkeypatch, "--predictions", tmp_path / "predictions.jsonl")
    assert (tmp_path / "epoch-3.unfinished").is_dir()


@pytest.mark.parametrize("kept", [slice(1), slice(2), slice(1, None)])
def test_outputs_are_scored_only_when_all_that_was_asked_for_are_there(monkeypatch, run, tmp_path, kept):
    generate = evaluate.generate

    def interfered(evaluation, *args):
        generate(evaluation, *args)
        path = evaluation.output / "predictions.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[kept]))

    monkeypatch.setattr(evaluate, "generate", interfered)
    with pytest.raises(cli.RunError, match="of the 4 answers that were asked for"):
        main(monkeypatch, "--adapter", run[0] / "out", "--output", tmp_path, "--limit", 2, "--max-new-tokens", 1)
    assert not (tmp_path / "metrics.json").exists()


def test_output_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    write(tmp_path / "predictions.jsonl", records())
    arguments = ["--predictions", "predictions.jsonl", "--output", "file/out"]
    code, text = Process("evaluate", arguments, tmp_path).wait()
    assert code == 2 and "file/out" in text and "another --output" in text and len(text.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Expected scores


def test_expected_scoring_gives_every_utterance_a_distribution_and_no_unparsed_output(evaluation, corpus):
    utterances = data.read_corpus(corpus, "test", limit=5)
    evaluate.generate(evaluation, utterances, how(scoring=["expected"]))
    lines = [line for line in lines_of(evaluation) if line["task"] == "APA"]
    for line in lines:
        assert list(line["scores"]) == list(prompts.SCORES) and "tokens" not in line
        for distribution in line["scores"].values():
            assert len(distribution) == 11 and sum(distribution) == pytest.approx(1, abs=1e-5)
        likeliest = {name: metrics.likeliest(p) for name, p in line["scores"].items()}
        assert prompts.parse_output("APA", line["output"]) == likeliest
    assert evaluate.scorings(lines_of(evaluation)) == ["expected"]
    numbers, _ = evaluate.score(lines_of(evaluation), "expected")
    human = [line["reference"]["total"] for line in lines]
    expected = [sum(i * p for i, p in enumerate(line["scores"]["total"])) for line in lines]
    assert numbers["total_mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(human, expected)) / 5)
    assert numbers["apa_unparsed"] == 0


def test_both_scorings_give_two_rows_and_the_second_ones_numbers_are_named(evaluation, corpus, tmp_path):
    utterances = data.read_corpus(corpus, "test", limit=5)
    evaluate.generate(evaluation, utterances, how(scoring=["greedy", "expected"]))
    rows = evaluate.rows_of(lines_of(evaluation), evaluation)
    assert [(row.label, row.transcribed) for row in rows] == [
        ("this run, epoch-2", True),
        ("this run, epoch-2, expected", False),
    ]
    evaluate.write_metrics(rows, evaluation)
    saved = json.loads((evaluation.output / "metrics.json").read_text())
    greedy_mae = rows[0].numbers["total_mae"]
    assert saved["total_mae"] == (None if math.isnan(greedy_mae) else greedy_mae)
    assert saved["expected_total_mae"] == rows[1].numbers["total_mae"] and "expected_per" not in saved


# ----------------------------------------------------------------------------------------------------------------------
# Intervals, other audio, two systems


def spoken(count=12):
    """The records above, of four speakers."""
    return [line | {"speaker": f"s{int(line['id'][1:]) % 4}"} for line in records(count)]


def test_intervals_need_speakers(capsys):
    with_speakers, without = (
        evaluate.rows_of(lines, evaluate.Evaluation("x", Path("out"))) for lines in (spoken(), records(12))
    )
    low, high = with_speakers[0].intervals["detection_precision"]
    assert low <= with_speakers[0].numbers["detection_precision"] <= high and without[0].intervals == {}
    shown = tables.result_tables(with_speakers, [evaluate.canonical_floor(records(12))])
    assert [name for name, _ in shown[0][2]][-3:] == ["says everything right", "this run, x", "  95% x"]
    assert all(len(cells) == len(columns) for _, columns, rows in shown for _, cells in rows)


def test_each_phone_is_reported_with_its_confusions():
    (_, columns, phones), (_, _, often) = tables.phone_tables(records())
    assert columns[:3] == ["heard", "precision", "recall"]
    assert dict(phones)["IY"] == ["6", "-", "0.000", "-:6"] and dict(phones)["W"][:3] == ["6", "1.000", "1.000"]
    assert often == [("IY > nothing", ["6", "1.000"])]


def test_other_audio_is_evaluated_beside_the_own(monkeypatch, run, corpus, tmp_path, capsys):
    where = ["--adapter", str(run[0] / "out"), "--output", str(tmp_path), "--limit", "4", "--max-new-tokens", "5"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *where, "--audio-ablation", "silence"])
    evaluate.main()
    printed = capsys.readouterr().out
    assert "this run, epoch-2, silence" in printed and "Own audio less silence" in printed
    assert (tmp_path / "predictions.jsonl").exists() and (tmp_path / "silence" / "predictions.jsonl").exists()
    assert "says everything right" in printed


def test_silence_has_the_length_and_swapped_audio_another_speaker(corpus):
    utterances = data.read_corpus(corpus, "test")
    silent, swapped = (data.ablate(utterances, how) for how in ("silence", "swap"))
    assert [len(data.read_audio(u.recording)) for u in silent] == [u.samples for u in utterances]
    assert all(not data.read_audio(u.recording).any() for u in silent)
    with pytest.raises(cli.InputError, match="--audio-ablation swap needs recordings of two speakers"):
        data.ablate(utterances[:3], "swap")
    by_bytes = {u.recording(): u.speaker for u in utterances}
    assert all(by_bytes[u.recording()] != u.speaker and u.samples == len(data.read_audio(u.recording)) for u in swapped)
    assert [u.text for u in swapped] == [u.text for u in utterances]


def test_a_comparison_shows_differences_and_refuses_other_utterances(tmp_path, capsys):
    better = spoken()
    for line in better[1::2]:
        line["output"] = prompts.mdd_target("WE SEE", line["reference"]["heard"])
    a, b = write(tmp_path / "a.jsonl", spoken()), write(tmp_path / "b.jsonl", better[::-1])
    evaluate.compare(a, b)
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("per "))
    assert row[1:4] == ["0.250", "0.000", "+0.250"] and float(row[-1]) < 0.05
    assert "A alone is right 0 times, B alone 12 times" in printed
    with pytest.raises(cli.InputError, match="2 outputs are in one alone, or have other references, such as u11 APA"):
        evaluate.compare(a, write(tmp_path / "c.jsonl", better[:-2]))
    with pytest.raises(cli.InputError, match="the files name no speakers"):
        evaluate.compare(write(tmp_path / "d.jsonl", records()), write(tmp_path / "e.jsonl", records()))


# ----------------------------------------------------------------------------------------------------------------------
# One's own recordings


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_an_own_recording_is_assessed_and_its_words_marked(monkeypatch, run, corpus, tmp_path, capsys, arguments):
    utterance = data.read_corpus(corpus, "test", limit=1)[0]
    (tmp_path / "my.wav").write_bytes(utterance.recording())
    what = ["--audio", str(tmp_path / "my.wav"), "--text", "we see it", *arguments]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--adapter", str(run[0] / "out"), "--max-new-tokens", "20", *what])
    evaluate.main()
    printed = capsys.readouterr().out
    if arguments:
        (result,) = json.loads(printed)
        assert result["file"] == "my.wav" and len(result["scores"]["total"]["distribution"]) == 11
    else:
        assert "my.wav" in printed and "accuracy" in printed and "\x1b[" not in printed


@pytest.mark.parametrize("option", ["--revision", "--data-revision"])
def test_a_revision_of_a_folder_is_refused(monkeypatch, run, tmp_path, option):
    with pytest.raises(cli.InputError, match=f"^{option} x is of a hub id, and .* is a folder: leave it out"):
        main(monkeypatch, "--adapter", run[0] / "out", "--output", tmp_path / "out", option, "x")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--audio", "x.wav"], "nothing to evaluate"),
        (["--adapter", "out", "--text", "WE"], "--text is for recordings: give --audio as well"),
        (["--adapter", "out", "--json"], "--json is for recordings: give --audio as well"),
        (["--adapter", "out", "--audio", "x.wav", "--limit", "3"], "not a corpus: leave out --limit"),
        (
            ["--adapter", "out", "--audio", "x.wav", "--epochs", "all"],
            "--audio takes one model: leave out --epochs all",
        ),
        (["--adapter", "out", "--base", "--audio", "x.wav"], "give --adapter or --base"),
        (["--compare", "a", "b", "--output", "x"], "--compare reads two predictions files: leave out --output"),
        (["--predictions", "a", "--data", ""], "--data is empty"),
        (["--compare", "a", ""], "a value is empty"),
        (["--predictions", "a", "--resume"], "--predictions scores a saved file: leave out --resume"),
        (["--predictions", "a", "--audio-ablation", "swap"], "leave out --audio-ablation"),
    ],
)
def test_arguments_that_cannot_work_together_are_named(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    with pytest.raises(cli.InputError, match=message):
        evaluate.parse_arguments()
