import argparse
import json
import math
from pathlib import Path

import pytest
from conftest import ROOT, greedy, script
from processes import Process

import data
import evaluate
import metrics
import model as models
import prompts
import tables
from support import cli

METRIC_KEYS = {f"{name}_{kind}" for name in prompts.SCORES for kind in ("pcc", "pvalue", "mae")} | {
    "wer", "per", "detection_precision", "detection_recall", "detection_f1", "phone_agreement_precision",
    "phone_agreement_recall", "phone_agreement_f1", "apa_unparsed", "mdd_unparsed", "apa_truncated", "mdd_truncated",
}  # fmt: skip


def records(count=6):
    """Predictions of a system that is one point off in accuracy and misses the last phone."""
    lines = []
    for i in range(count):
        scores = {"accuracy": i, "fluency": 9 - i, "prosodic": 5, "total": i % 3}
        output = prompts.apa_target(scores | {"accuracy": i + 1})
        lines.append({"id": f"u{i}", "task": "APA", "output": output, "reference": scores, "truncated": False})
        reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
        output = prompts.mdd_target("WE SEE", ["W", "IH", "S"])
        lines.append({"id": f"u{i}", "task": "MDD", "output": output, "reference": reference, "truncated": i == 0})
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_papers_table_is_typed_as_printed():
    assert tables.PAPER["lora", 3] == (0.656, 0.727, 0.711, 0.675, 0.14, 0.114, 0.724, 0.728, 0.721)
    assert len(tables.PAPER) == 9 and {len(row) for row in tables.PAPER.values()} == {len(tables.TABLE_3)}


def test_scoring_counts_what_was_unparsed_and_cut_off():
    lines = records()
    lines[0]["output"] = "no scores today"
    lines[3]["output"] = '{"word_transcript": "WE SE'
    numbers, reasons = evaluate.score(lines)
    assert METRIC_KEYS <= numbers.keys()
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


@pytest.mark.parametrize("label, settings, row", [
    ("base", {"strategy": "unfreeze", "epoch": 2}, ("base", 0)),
    ("epoch-2", {"strategy": "lora", "epoch": 2}, ("lora", 2)),
    ("epoch-4", {"strategy": "unfreeze", "epoch": 4}, ("unfreeze", 4)),
    ("epoch-9", {"strategy": "lora", "epoch": 9}, ("lora", 3)),
    ("epoch-2", {"strategy": "full", "epoch": 2}, ("lora", 2)),
    ("predictions", {}, ("lora", 3)),
])  # fmt: skip
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
    assert METRIC_KEYS <= saved.keys() and saved["prosodic_pcc"] is None and saved["per"] == 1 / 4
    assert (tmp_path / "figure5.png").read_bytes().startswith(b"\x89PNG")
    assert "no prosodic_pcc: all 6 predicted scores are 5" in result.stdout
    assert "this run, predictions" in result.stdout and "paper, lora, epoch 3" in result.stdout


@pytest.mark.parametrize("content, message", [
    ("", "is empty"),
    ('{"id": "u", "task": "APA"', "line 1 of"),
    ('{"id": "u", "task": "ASR", "output": "", "reference": {}}', "line 1 of"),
    ('{"id": "u", "task": "APA", "output": "", "reference": {"accuracy": 1}}', "line 1 of"),
    (json.dumps({k: v for k, v in records(1)[0].items() if k != "id"}), "line 1 of"),
    (json.dumps(records(1)[0]) + "\n" + json.dumps(records(1)[1] | {"output": None}), "line 2 of"),
    (json.dumps(records(1)[1] | {"reference": {"word_transcript": "", "canonical": [], "heard": "W"}}), "line 1 of"),
    ("[]", "line 1 of"),
])  # fmt: skip
def test_a_file_that_holds_no_predictions_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(cli.InputError, match=message):
        evaluate.read_predictions(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to evaluate"),
    (["--predictions", "missing.jsonl"], "missing.jsonl cannot be read"),
    (["--adapter", "nowhere"], "nowhere holds no adapter"),
    (["--adapter", "nowhere", "--predictions", "x", "--batch-size", "3"], "leave out --adapter --batch-size"),
    (["--summarise", "out", "--adapter", "out"], "--summarise reads metrics.json: leave out --adapter"),
    (["--summarise", "out", "--output", "x"], "--summarise reads metrics.json: leave out --output"),
    (["--base", "--epochs", "2"], "--epochs 2 chooses among those of a run: give --adapter as well"),
    (["--adapter", "out", "--predictions", "x"], "--predictions scores a saved file: leave out --adapter"),
    (["--base", "--batch-size", "0"], "--batch-size 0 is not a number from 1 up"),
    (["--base", "--model", "nowhere"], "model nowhere is not a folder here, revision refs/pr/70 of it is not whole"),
])  # fmt: skip
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
                "word_transcript": utterance.text, "canonical": utterance.canonical, "heard": utterance.heard
            }  # fmt: skip
        assert len(lines) == 10
        saved = json.loads((run[0] / "out" / label / "metrics.json").read_text())
        again = evaluate.score(lines)[0]
        numbers = {key: value for key, value in saved.items() if not key.endswith(("_low", "_high"))}
        assert numbers == {"evaluated": label} | {k: None if math.isnan(v) else v for k, v in again.items()}


def test_an_adapter_folder_itself_and_a_single_epoch_can_be_named(run):
    (run[0] / "out" / "epoch-3.unfinished").mkdir(exist_ok=True)  # what a run that was killed while saving leaves behind
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


@pytest.mark.parametrize("arguments", [
    ["--strategy", "full"], ["--strategy", "unfreeze", "--rank", 2], ["--quantize", "nf4", "--rank", 2],
    ["--quantize", "nf4", "--speech-adapter", "continue"],
])  # fmt: skip
def test_what_was_trained_is_what_is_evaluated(checkpoint, corpus, tmp_path, arguments):
    where = ["--model", checkpoint, "--data", corpus, "--limit", 4, "--epochs", 3, "--learning-rate", 1e-2]
    code, text = Process("train", [*where, *arguments], tmp_path).wait()
    assert code == 0, text
    code, text = Process("evaluate", ["--adapter", "out", "--limit", 3, "--max-new-tokens", 20], tmp_path).wait()
    assert code == 0 and "paper, lora, epoch 3" in text or "paper, unfreeze, epoch 3" in text, text
    written = evaluate.read_predictions(tmp_path / "out" / "predictions.jsonl")
    chosen = dict(zip(arguments[::2], arguments[1::2]))
    way, quantize = chosen.get("--speech-adapter", "merge"), chosen.get("--quantize")
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", way, quantize)
    untrained = greedy(model, data.read_corpus(corpus, "test", limit=3), "MDD", 20)
    models.load_trained(model, tmp_path / "out" / "epoch-3", chosen.get("--strategy", "lora"))
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
    runs = [evaluated(tmp_path / f"seed-{i}", per=per, accuracy_pcc=pcc)
            for i, (per, pcc) in enumerate([(0.1, 0.5), (0.2, None), (0.6, 0.7)])]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--summarise", *map(str, runs)])
    evaluate.main()
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in map(str.split, printed.splitlines()) if cells}
    std = ((0.2**2 + 0.1**2 + 0.3**2) / 2) ** 0.5
    assert rows["per"] == ["0.300", f"{std:.3f}", "0.100", "0.600", "3"]
    assert rows["accuracy_pcc"] == ["0.600", "0.141", "0.500", "0.700", "2"]
    assert "3 runs, 20 utterances each" in printed and "utterances" not in rows


@pytest.mark.parametrize("change, message", [
    ({"utterances": 10}, "evaluated on different utterances: .*one on 20 utterances, .*two on 10"),
    (None, "two/metrics.json cannot be read, or is not evaluate.py's: evaluate the run first"),
])  # fmt: skip
def test_runs_that_cannot_be_compared_are_not_summarised(tmp_path, change, message):
    runs = [evaluated(tmp_path / "one"), tmp_path / "two"]
    if change:
        evaluated(runs[1], **change)
    with pytest.raises(cli.InputError, match=message):
        tables.summarise(runs)
    with pytest.raises(cli.InputError, match="is one run: a spread needs two or more"):
        tables.summarise(runs[:1])


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


@pytest.mark.parametrize("content, message", [("{", "cannot be read"), ('{"epoch": 1}', "lacks data, model, spee")])
def test_settings_that_train_py_did_not_write_are_refused(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(cli.InputError, match=message):
        evaluate.adapter_folders(tmp_path, None)


def test_words_and_scores_named_in_metrics_are_those_of_prompts():
    assert metrics.SCORES == prompts.SCORES


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def how(**changes):
    """What generate() takes of the command line."""
    chosen = {"model": None, "revision": None, "dtype": None, "attention": None, "batch_size": 2, "max_new_tokens": 2,
              "scoring": ["greedy"], "resume": False}  # fmt: skip
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
    assert saved["total_mae"] == rows[0].numbers["total_mae"] or saved["total_mae"] is None
    assert saved["expected_total_mae"] == rows[1].numbers["total_mae"] and "expected_per" not in saved


# ----------------------------------------------------------------------------------------------------------------------
# Intervals, other audio, two systems


def spoken(count=12):
    """The records above, of four speakers."""
    return [line | {"speaker": f"s{int(line['id'][1:]) % 4}"} for line in records(count)]


def test_intervals_need_speakers(capsys):
    with_speakers, without = (evaluate.rows_of(lines, evaluate.Evaluation("x", Path("out")))
                              for lines in (spoken(), records(12)))  # fmt: skip
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
    assert "pauses and energy" in printed and "says everything right" in printed


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


@pytest.mark.parametrize("arguments, message", [
    (["--audio", "x.wav"], "nothing to evaluate"),
    (["--adapter", "out", "--text", "WE"], "--text is for recordings: give --audio as well"),
    (["--adapter", "out", "--json"], "--json is for recordings: give --audio as well"),
    (["--adapter", "out", "--audio", "x.wav", "--limit", "3"], "not a corpus: leave out --limit"),
    (["--adapter", "out", "--audio", "x.wav", "--epochs", "all"], "--audio takes one model: leave out --epochs all"),
    (["--adapter", "out", "--base", "--audio", "x.wav"], "give --adapter or --base"),
    (["--compare", "a", "b", "--output", "x"], "--compare reads two predictions files: leave out --output"),
    (["--predictions", "a", "--resume"], "--predictions scores a saved file: leave out --resume"),
    (["--predictions", "a", "--audio-ablation", "swap"], "leave out --audio-ablation"),
])  # fmt: skip
def test_arguments_that_cannot_work_together_are_named(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    with pytest.raises(cli.InputError, match=message):
        evaluate.parse_arguments()
