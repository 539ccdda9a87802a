import hashlib
import inspect
import json
import math
import os
from pathlib import Path
import shutil
from unittest.mock import Mock

import numpy as np
from processes import Process
import pytest
from records import records, write

import data
import evaluate
import metrics
import model as models
import prompts
from support import answers, cli, pretrained
from support import run as runs

METRIC_KEYS = {
    *(f"{name}_{kind}" for name in prompts.SCORES for kind in ("pcc", "pvalue", "mae")),
    *("wer", "per", "apa_unparsed", "mdd_unparsed", "apa_truncated", "mdd_truncated"),
    *(f"{f1}_{kind}" for f1 in ("detection", "phone_agreement") for kind in ("precision", "recall", "f1")),
}


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


# ----------------------------------------------------------------------------------------------------------------------
# Table 3


@pytest.mark.parametrize(
    "label, strategy, epoch, row",
    [
        ("base", "unfreeze", 2, "unmodified"),
        ("epoch-2", "lora", 2, "lora, epoch 2"),
        ("epoch-4", "unfreeze", 4, "unfreeze, epoch 4"),
        ("epoch-9", "lora", 9, "lora, epoch 3"),
        ("predictions", None, None, None),
        ("epoch-2, silence", "lora", 2, None),
    ],
)
def test_a_run_is_compared_with_the_papers_row_of_its_epoch(label, strategy, epoch, row):
    training = {"epoch": epoch, "strategy": strategy, "speech_adapter": "merge", "model": "m", "data": "d"}
    training = runs.TrainingSettings(**training) if epoch else None
    assert evaluate.Evaluation(label, Path("out"), None, training).paper_row == row


def test_the_table_has_our_rows_with_intervals_the_floor_and_the_papers():
    named, unnamed = (evaluate.rows_of(lines, "x", "unfreeze, epoch 3") for lines in (records(12, 4), records(12)))
    assert named[0].intervals and not unnamed[0].intervals
    table_3, *_ = evaluate.tables(named, [evaluate.copying_floor(records(12))])
    names = [name for name, _ in table_3[2]]
    assert names == [
        *("this run, x", "canonical phones"),
        "paper, unmodified",
        *(f"paper, unfreeze, epoch {epoch}" for epoch in (1, 2, 3, 4)),
    ]
    assert all(len(cells) == 9 for _, cells in table_3[2]) and "\n±" in table_3[2][0][1][0]


def test_numbers_within_005_of_the_papers_are_marked_on_its_corpus_alone(monkeypatch):
    paper = dict(zip(evaluate.TABLE_3, evaluate.PAPER["lora, epoch 3"]))
    row = evaluate.Row("x", paper | {"per": 0.114 + 0.051, "wer": 0.14 - 0.049}, near=paper)
    _, _, [(_, texts)] = evaluate.make_table("", evaluate.TABLE_3, [row])
    assert texts[0] == "*0.656" and texts[4] == "*0.091" and texts[5] == "0.165"
    lines = records(12)
    assert not evaluate.rows_of(lines, "x", "lora, epoch 3")[0].near
    ids = "\n".join(sorted({line["id"] for line in lines}))
    monkeypatch.setattr(evaluate, "PAPER_CORPUS", hashlib.sha256(ids.encode()).hexdigest())
    assert evaluate.rows_of(lines, "x", "lora, epoch 3")[0].near == paper
    assert not evaluate.rows_of(lines, "x", None)[0].near


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give --adapter"),
        (["--predictions", "here.jsonl", "--adapter", "out", "--batch-size", "3"], "leave out --adapter --batch-size"),
        (["--predictions", "here.jsonl", "--output", "file/out"], "file/out"),
        (["--base", "--epochs", "2"], "--epochs 2 .*give --adapter"),
        (["--base", "--model", "{checkpoint}", "--revision", "x"], "--revision x .* is a folder"),
    ],
)
def test_a_users_mistake_is_named_before_anything_slow(monkeypatch, tmp_path, checkpoint, arguments, message):
    monkeypatch.setattr(models, "load_base", None)
    monkeypatch.setattr(data, "read_corpus", None)
    write(tmp_path / "here.jsonl", records())
    (tmp_path / "file").touch()
    with pytest.raises(cli.InputError, match=message):
        main(monkeypatch, *(argument.format(checkpoint=checkpoint) for argument in arguments))


# ----------------------------------------------------------------------------------------------------------------------
# What is evaluated


def test_every_epoch_and_the_base_give_a_row_and_files_and_a_saved_file_the_same(
    monkeypatch, run, corpus, tmp_path, capsys
):
    arguments = ["--adapter", run[0] / "out", "--epochs", "all", "--base", "--limit", 3, "--batch-size", 2]
    main(monkeypatch, *arguments, "--max-new-tokens", 12, "--output", tmp_path / "out")
    text = [line.split() for line in capsys.readouterr().out.splitlines()]
    for label in ("base", "epoch-1", "epoch-2"):
        lines = answers.read(tmp_path / "out" / label / "predictions.jsonl")
        for utterance, apa, mdd in zip(data.read_corpus(corpus, "test", limit=3), lines[::2], lines[1::2], strict=True):
            assert apa["id"] == mdd["id"] == utterance.id and apa["tokens"] <= 12
            assert (apa["reference"], mdd["reference"]) == tuple(data.reference(utterance, t) for t in prompts.TASKS)
        saved = json.loads((tmp_path / "out" / label / "metrics.json").read_text())
        assert saved.keys() >= METRIC_KEYS
        assert (saved["written_by"], saved["evaluated"]) == ("pronunciation/evaluate.py", label)
        for key, value in metrics.score(lines)[0].items():
            assert saved[key] == (None if math.isnan(value) else value)
        saved_file = tmp_path / "out" / label / "predictions.jsonl"
        _, asked = evaluate.choose_corpus(evaluate.saved_evaluation(saved_file), evaluate.CorpusSettings())
        assert (asked.data, asked.data_revision) == (str(corpus), None)
        main(monkeypatch, "--predictions", saved_file, "--output", tmp_path / f"again-{label}")
        assert json.loads((tmp_path / f"again-{label}" / "metrics.json").read_text()) == saved
        again = [line.split() for line in capsys.readouterr().out.splitlines() if f"this run, {label}" in line]
        assert again and all(row in text for row in again)


def test_what_wrote_a_saved_file_is_not_known_where_it_stands_alone(tmp_path):
    path = write(tmp_path / "predictions.jsonl", records())
    assert evaluate.saved_evaluation(path) == evaluate.Evaluation("predictions", tmp_path)
    (tmp_path / "predictions.settings.json").write_text('{"evaluated": "epoch-1", "strategy": "lora", "epoch": 1}')
    assert evaluate.saved_evaluation(path).paper_row == "lora, epoch 1"
    renamed = shutil.copy(path, tmp_path / "mine.jsonl")
    assert evaluate.saved_evaluation(Path(renamed)).label == "predictions"
    (tmp_path / "predictions.jsonl.part").touch()  # of an evaluation that goes on, whose settings these are
    assert evaluate.saved_evaluation(path).label == "predictions"


def test_an_adapter_folder_itself_and_a_single_epoch_can_be_named(run):
    unfinished = run[0] / "out" / ".pronunciation-host-1-epoch-3"  # of a run that was killed while saving
    unfinished.mkdir(exist_ok=True)
    (unfinished / "adapter_config.json").touch()
    ((folder, training),) = runs.adapters(run[0] / "out" / "epoch-1", None)
    assert folder.name == "epoch-1" and training.epoch == 1
    for epochs, names in (("last", ["epoch-2"]), ("1", ["epoch-1"]), ("all", ["epoch-1", "epoch-2"])):
        assert [f.name for f, _ in runs.adapters(run[0] / "out", epochs)] == names
    with pytest.raises(cli.InputError, match="'7': there are epoch-1, epoch-2"):
        runs.adapters(run[0] / "out", "7")


@pytest.mark.slow
@pytest.mark.parametrize("strategy, way, quantize", [("unfreeze", "merge", None), ("lora", "continue", "nf4")])
def test_what_was_trained_is_what_is_evaluated(checkpoint, corpus, tmp_path, strategy, way, quantize):
    where = ["--model", checkpoint, "--data", corpus, "--limit", 4, "--epochs", 3, "--learning-rate", 1e-2]
    where += ["--strategy", strategy, "--speech-adapter", way]
    code, text = Process("train", [*where, *(["--quantize", quantize] if quantize else [])], tmp_path).wait()
    assert code == 0, text
    code, text = Process("evaluate", ["--adapter", "out", "--limit", 3, "--scoring", "expected"], tmp_path).wait()
    assert code == 0 and f"paper, {strategy}, epoch 3" in text, text
    written = [line for line in answers.read(tmp_path / "out" / "predictions.jsonl") if line["task"] == "APA"]
    model = models.load_base(pretrained.find(checkpoint), "float32", "sdpa", way, quantize)
    asked = data.read_corpus(corpus, "test", limit=3)
    untrained = models.answer(model.eval(), asked, ("expected",), tasks=["APA"])
    models.load_trained(model, tmp_path / "out" / "epoch-3", strategy)
    expected = models.answer(model, asked, ("expected",), tasks=["APA"])
    # Probabilities, not texts: 4 bits are multiplied in low precision (2e-4 was measured), and near ties fall otherwise
    near = 1e-3 if quantize else 1e-6
    found = [
        np.array([list(line["scores"].values()) for line in sorted(lines, key=lambda line: line["id"])])
        for lines in (written, expected, untrained)
    ]
    assert np.abs(found[0] - found[1]).max() < near < 0.05 < np.abs(found[2] - found[1]).max()


def test_the_unmodified_model_has_its_speech_adapter_and_is_not_quantised(monkeypatch, evaluation):
    evaluation.adapter = None
    evaluation.training = evaluation.training.model_copy(update={"speech_adapter": "continue", "quantize": "nf4"})
    loaded, load_base = [], inspect.signature(models.load_base)
    monkeypatch.setattr(models, "load_base", lambda *args: loaded.append(load_base.bind(*args).arguments) or Mock())
    evaluate.load(evaluation, *settings(evaluation))
    assert (loaded[0]["speech_adapter"], loaded[0].get("quantize")) == ("merge", None)


@pytest.mark.parametrize("base", [True, False])
def test_the_unmodified_model_is_asked_without_control_token(monkeypatch, evaluation, corpus, base):
    evaluation.adapter = None if base else evaluation.adapter
    seen, question = [], models.question

    def spy(model, *args):
        seen.append(question(model, *args))
        return seen[-1]

    monkeypatch.setattr(models, "question", spy)
    generate(evaluation, data.read_corpus(corpus, "test", limit=1))
    model = evaluate.load(evaluation, *settings(evaluation))
    controls = [set(model.control_ids) & set(example.prompt_ids) for example in seen]
    assert [bool(found) for found in controls] == [not base] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def settings(evaluation, **changes):
    return evaluate.choose_model(evaluation, evaluate.Settings(**{"batch_size": 2, "max_new_tokens": 2} | changes))


def generate(evaluation, utterances, **changes):
    checkpoint, chosen = settings(evaluation, **changes)
    return evaluate.generate(evaluation, checkpoint, utterances, chosen)


@pytest.fixture
def evaluation(run, tmp_path):
    ((folder, training),) = runs.adapters(run[0] / "out", "last")
    return evaluate.Evaluation("epoch-2", tmp_path / "out", folder, training)


@pytest.fixture
def answered(monkeypatch):
    """Batches of utterances that the model was asked about."""
    batches, answer = [], models.answer
    monkeypatch.setattr(models, "answer", lambda m, us, *rest: batches.append(us) or answer(m, us, *rest))
    return batches


def test_outputs_are_in_the_corpus_order_whatever_the_batches_are(evaluation, corpus, answered):
    utterances = data.read_corpus(corpus, "test", limit=5)
    texts = []
    for size in (1, 2, 5):
        answered.clear()
        lines = generate(evaluation, utterances, batch_size=size, max_new_tokens=12)
        assert [(line["id"], line["task"]) for line in lines] == [(u.id, t) for u in utterances for t in prompts.TASKS]
        assert [line["speaker"] for line in lines[::2]] == [u.speaker for u in utterances]
        assert [u.samples for batch in answered for u in batch] == sorted(u.samples for u in utterances)
        texts.append([line["output"] for line in lines])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("lines, cut", [(9, 0), (9, 30), (0, 0)])
def test_a_stopped_evaluation_goes_on_to_the_same_file(evaluation, corpus, answered, lines, cut):
    """The part file ends after some lines, with a line that was cut off, or with an utterance that lacks a task."""
    utterances = data.read_corpus(corpus, "test", limit=6)
    generate(evaluation, utterances)
    file = evaluation.output / "predictions.jsonl"
    whole, part = file.read_text(), file.with_name("predictions.jsonl.part")
    in_batches = {line["id"]: [] for line in map(json.loads, whole.splitlines())}
    for line in whole.splitlines(keepends=True):
        in_batches[json.loads(line)["id"]].append(line)
    written = "".join(line for batch in answered for u in batch for line in in_batches[u.id])
    kept = "".join(written.splitlines(keepends=True)[:lines])
    part.write_text(kept[: len(kept) - cut])
    file.unlink()
    answered.clear()
    generate(evaluation, utterances, resume=True)
    assert file.read_text() == whole and not part.exists()
    assert sum(map(len, answered)) == (2 if lines else 6)
    answered.clear()
    generate(evaluation, utterances, resume=True)
    assert file.read_text() == whole and not answered  # nothing left to do


def test_a_broken_line_of_a_stopped_evaluation_is_refused(evaluation, corpus):
    utterances = data.read_corpus(corpus, "test", limit=2)
    generate(evaluation, utterances)
    lines = (evaluation.output / "predictions.jsonl").read_text().splitlines(keepends=True)
    for broken in ("{\n", lines[0]):
        (evaluation.output / "predictions.jsonl.part").write_text("".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(cli.InputError, match="^line 3 of "):
            generate(evaluation, utterances, resume=True)


def test_outputs_of_other_settings_are_not_gone_on_with(evaluation, corpus):
    utterances = data.read_corpus(corpus, "test", limit=2)
    generate(evaluation, utterances)
    for chosen, changes in ((utterances, {"max_new_tokens": 3}), (utterances[:1], {})):
        with pytest.raises(cli.InputError, match="--resume: .* another model, corpus or setting.*another --output"):
            generate(evaluation, chosen, resume=True, **changes)


def test_a_model_that_cannot_be_loaded_leaves_the_evaluation_before(evaluation, corpus, monkeypatch):
    utterances = data.read_corpus(corpus, "test", limit=2)
    generate(evaluation, utterances)
    before = {path.name: path.read_bytes() for path in evaluation.output.iterdir()}
    monkeypatch.setattr(evaluate, "load", lambda *_: (_ for _ in ()).throw(cli.InputError("no model")))
    with pytest.raises(cli.InputError, match="no model"):
        generate(evaluation, utterances, max_new_tokens=3)
    assert {path.name: path.read_bytes() for path in evaluation.output.iterdir()} == before


def test_expected_scores_are_a_second_row_of_distributions_without_unparsed_outputs(evaluation, corpus):
    lines = generate(evaluation, data.read_corpus(corpus, "test", limit=5), scoring=("greedy", "expected"))
    assert metrics.scorings(lines) == ["greedy", "expected"]
    assert metrics.score(lines, "expected")[0]["apa_unparsed"] == 0
    for line in lines[::2]:
        assert list(line["scores"]) == list(prompts.SCORES)
        for distribution in line["scores"].values():
            assert len(distribution) == 11 and sum(distribution) == pytest.approx(1, abs=1e-5)
    rows = evaluate.score(lines, "epoch-2", "lora, epoch 2", evaluation.output)
    assert [row.label for row in rows] == ["this run, epoch-2", "this run, epoch-2, expected"]
    saved = json.loads((evaluation.output / "metrics.json").read_text())
    assert saved["expected_total_mae"] == rows[1].numbers["total_mae"] and "expected_per" not in saved


# ----------------------------------------------------------------------------------------------------------------------
# What is written, and what is left alone


def test_what_something_else_wrote_is_not_replaced(monkeypatch, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / answers.METRICS).symlink_to("nowhere")
    with pytest.raises(cli.InputError, match="metrics.json is there already.*another --output"):
        main(monkeypatch, "--adapter", run[0] / "out", "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [".pronunciation-evaluate.py.lock", answers.METRICS]


def test_a_saved_file_is_scored_twice_beside_it_and_never_overwritten(monkeypatch, tmp_path):
    content = write(tmp_path / "predictions.jsonl", records()).read_bytes()
    for _ in range(2):
        main(monkeypatch, "--predictions", tmp_path / "predictions.jsonl")
        assert (tmp_path / "predictions.jsonl").read_bytes() == content
    (tmp_path / "metrics.json").write_text('{"utterances": 3, "accuracy": 0.5}')  # of something else
    with pytest.raises(cli.InputError, match="is there already"):
        main(monkeypatch, "--predictions", tmp_path / "predictions.jsonl")
