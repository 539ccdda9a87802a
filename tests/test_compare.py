"""Comparing runs and groups of seeds, and the phones of one run."""

import csv
import io
import statistics

from conftest import call
import numpy as np
import pytest
from records import one_hot, records, write
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support
from test_metrics import lines, strings, system

from analysis import compare, phones
import metrics
import prompts
from support import cli


def run(monkeypatch, capsys, command, *arguments):
    """What a command of analysis/ prints, called in this process."""
    call(monkeypatch, command, *arguments)
    return capsys.readouterr().out


def table(printed):
    """The rows of --format csv, by name and column."""
    return {row.pop("name"): row for row in csv.DictReader(io.StringIO(printed))}


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Six runs: three of one system, three of a better one. Folders, as evaluate.py leaves them."""
    monkeypatch.setattr(metrics, "RESAMPLES", 250)  # for time
    folders = [tmp_path / f"{name}-{seed}" for name in ("a", "b") for seed in range(3)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        lines = system(i, right=0.8 if i < 3 else 0.95)
        write(folder / "predictions.jsonl", lines[::-1] if i == 4 else lines)  # in another order
    return folders


def score(folder, key):
    return metrics.score(compare.read_runs((folder,))[0])[0][key]


def test_two_runs_are_subtracted_on_the_same_speakers(monkeypatch, capsys, seeds):
    first, second = seeds[0], seeds[4]
    printed = run(monkeypatch, capsys, compare, first, "--against", second / "predictions.jsonl", "--format", "csv")
    row = table(printed)["per"]
    ours, theirs = score(first, "per"), score(second, "per")
    samples = [metrics.score(lines, resample=True)[1]["per"] for lines in compare.read_runs((first, second))]
    low, high = metrics.interval(samples[0] - samples[1])
    expected = [f"{ours:.3f}", f"{theirs:.3f}", f"{ours - theirs:+.3f}", f"{low:+.3f}", f"{high:+.3f}"]
    assert list(row.values()) == [*expected, compare.pvalue_text(samples[0] - samples[1])]
    text = run(monkeypatch, capsys, compare, first, "--against", second)
    right = [compare.decided_well(lines) for lines in compare.read_runs((first, second))]
    alone = sum(a and not b for a, b in zip(*right)), sum(b and not a for a, b in zip(*right))
    assert f"A alone is right {alone[0]} times, B alone {alone[1]} times" in " ".join(text.split())


def test_a_p_value_says_where_so_many_resamples_cannot_tell_a_smaller_one():
    assert compare.pvalue_text(np.ones(1000)) == "≤ 0.002"
    assert compare.pvalue_text(np.array([-1.0] * 2 + [1.0] * 998)) == "0.004"


def test_two_groups_of_seeds_are_compared_by_their_means(monkeypatch, capsys, seeds):
    rows = table(run(monkeypatch, capsys, compare, *seeds[:3], "--against", *seeds[3:], "--format", "csv"))
    ours, theirs = ([score(folder, "per") for folder in group] for group in (seeds[:3], seeds[3:]))
    row, welch = rows["per"], stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    assert row["A-B"] == f"{statistics.fmean(ours) - statistics.fmean(theirs):+.3f}"
    assert (row["std A"], row["p, runs"]) == (f"{statistics.stdev(ours):.3f}", f"{welch:.3f}")
    groups = map(compare.read_runs, (seeds[:3], seeds[3:]))
    drawn = [np.mean([metrics.score(run, resample=True)[1]["per"] for run in group], axis=0) for group in groups]
    assert float(row["from"]) == pytest.approx(metrics.interval(drawn[0] - drawn[1])[0], abs=6e-4)
    assert {"accuracy_spearman", "accuracy_sd_ratio"} <= rows.keys()


def test_one_group_shows_how_much_its_runs_differ(monkeypatch, capsys, seeds):
    rows = table(run(monkeypatch, capsys, compare, *seeds[:3], "--format", "csv"))
    pers = [score(folder, "per") for folder in seeds[:3]]
    numbers = statistics.fmean(pers), statistics.stdev(pers), min(pers), max(pers)
    assert list(rows["per"].values()) == [*(f"{number:.3f}" for number in numbers), "3"]
    assert not {"utterances", "true_accept"} & rows.keys()


def test_latex_is_one_tabular_whose_text_is_escaped(capsys):
    compare.print_table("latex", "", ["≤ %"], [("per_sub", ["<unk>\x1b"])])
    lines = [r"\begin{tabular}{lr}", r"\hline", r"name & $\le$ \% \\", r"\hline"]
    body = [r"per\_sub & $<$unk$>$\textbackslash{}x1b \\", r"\hline", r"\end{tabular}"]
    assert capsys.readouterr().out.splitlines() == lines + body


def test_scorings_that_all_have_are_compared_else_the_one_of_each():
    greedy = [line | {"tokens": 5} for line in records()]
    both = [line | ({"scores": one_hot(8, 5)} if line["task"] == "APA" else {}) for line in greedy]
    expected = [{key: value for key, value in line.items() if key != "tokens"} for line in both]
    assert compare.scorings_of([[both], [both]]) == [["greedy", "expected"]] * 2
    assert compare.scorings_of([[both, both], [expected]]) == [["expected"]] * 2
    assert compare.scorings_of([[greedy], [expected]]) == [["greedy"], ["expected"]]
    with pytest.raises(cli.InputError, match="greedy answers alone, others expected"):
        compare.scorings_of([[greedy, expected], [both]])


RELABELLED = {"reference": dict.fromkeys(prompts.SCORES, 9)}


@pytest.mark.parametrize(
    "speakers, change, arguments, message",
    [
        (4, lambda lines: lines[:-2], "a b", "2 answers are in one alone, .*u11 APA: evaluate all on one corpus"),
        (4, lambda lines: [lines[0] | RELABELLED, *lines[1:]], "a --against b", "1 answers .*u0 APA"),
        (4, lambda lines: records(12, 3), "a --against b", "18 answers .*another speaker"),
        (1, list, "a --against b", "name no speakers, or one alone"),
        (4, list, "a --against b b", "b is named more than once"),
    ],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, capsys, tmp_path, speakers, change, arguments, message):
    write(tmp_path / "a", records(12, speakers)), write(tmp_path / "b", change(records(12, speakers)))
    with pytest.raises(cli.InputError, match=message):
        run(monkeypatch, capsys, compare, *arguments.split())


@pytest.mark.parametrize("task, key", [("APA", "total_mae"), ("MDD", "per")])
def test_scores_alone_and_phones_alone_are_enough(monkeypatch, capsys, tmp_path, task, key):
    a, b = (write(tmp_path / f"{i}.jsonl", [line for line in system(i) if line["task"] == task]) for i in range(2))
    for arguments in ([a, "--against", b], [a, b]):
        printed = run(monkeypatch, capsys, compare, *arguments)
        assert f"\n{key} " in printed and ("McNemar" in printed) == (task == "MDD" and "--against" in arguments)
        assert not any("nan" in line for line in printed.splitlines())
    assert ("scores alone" in run(monkeypatch, capsys, phones, a)) == (task == "APA")


# ----------------------------------------------------------------------------------------------------------------------
# Phones


def test_the_phone_report_equals_sklearn_on_aligned_phones():
    heard, written = strings(20, 50), strings(21, 50)
    pairs = [pair for h, w in zip(heard, written) for pair in metrics.align(h, w)]
    rows = dict(phones.phone_tables(lines(heard, written))[0][2])
    labels = sorted(rows)
    named = [[phone or "-" for phone in side] for side in zip(*pairs)]
    precision, recall, _, support = precision_recall_fscore_support(*named, labels=labels, zero_division=np.nan)
    texts = [[f"{number:.3f}".replace("nan", "-") for number in numbers] for numbers in (precision, recall)]
    assert [rows[phone][:3] for phone in labels] == [list(row) for row in zip(map(str, support), *texts)]


def test_phones_confusions_and_detection_are_printed(monkeypatch, capsys, tmp_path):
    path = write(tmp_path / "predictions.jsonl", records(speakers=3))
    printed = run(monkeypatch, capsys, phones, path)
    ours, copied, *_ = (
        line.split()[-9:] for line in printed.splitlines() if line.startswith(("  canonical phones  ", "> this"))
    )
    assert copied == ["0.000", "-", "0.000", "1.000", "0.000", "-", "0.250", "0.000", "0.000"]
    assert ours == ["0.667", "0.500", "1.000", "0.000", "0.333", "0.000", "0.000", "0.250", "0.000"]
    assert "IY > nothing" in printed
    rows = table(run(monkeypatch, capsys, phones, path, "--format", "csv"))
    assert list(rows["IY"].values()) == ["6", "-", "0.000", "-:6"]
    assert list(rows["W"].values()) == ["6", "1.000", "1.000", ""] and list(tmp_path.iterdir()) == [path]
