"""Is one system better than another, or is it chance?

    python -m analysis.compare out --against other                      # two runs
    python -m analysis.compare out/seed-* --against other/seed-*        # two groups of seeds
    python -m analysis.compare out/seed-*                               # how much seeds differ

Runs are evaluated folders, or files like their predictions.jsonl, all of the same utterances. The difference of two
runs, or of the means of two groups, has an interval and a p-value by a paired bootstrap over speakers; groups also have
Welch's t-test over their runs. --format csv or latex prints the table alone. Needs no model.
"""

import csv
from dataclasses import dataclass
import math
from pathlib import Path
import sys
from typing import Literal

import numpy as np
from tyro.conf import Positional

import metrics
import prompts
from support import answers, cli

Format = Literal["table", "csv", "latex"]
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {sign: f"${sign}$" for sign in "<>"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "≤": r"$\le$"}
)
COUNTS = (*metrics.EVENTS, "utterances")  # of metrics.score: no measure of a system


@dataclass
class Settings:
    runs: Positional[tuple[Path, ...]]  # evaluated folders, or predictions.jsonl files: system A
    against: tuple[Path, ...] = ()  # the same of system B; without it: how much the runs of A differ
    format: Format = "table"


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def read_runs(paths: tuple[Path, ...]) -> list[list[dict]]:
    """The lines of each run's predictions, in one order. Raises InputError where they are of other utterances."""
    files = [path / answers.WHOLE if path.is_dir() else path for path in paths]
    runs = [{(record["id"], record["task"]): record for record in answers.read(file)} for file in files]
    asked = [{key: (record.get("speaker"), record["reference"]) for key, record in run.items()} for run in runs]
    for file, other in zip(files, asked):
        if wrong := sorted(key for key in asked[0].keys() | other.keys() if asked[0].get(key) != other.get(key)):
            raise cli.InputError(
                f"{files[0]} and {file}: {len(wrong)} answers are in one alone, or have another speaker or reference, "
                f"such as {' '.join(wrong[0])}: evaluate all on one corpus"
            )
    return [[run[key] for key in runs[0]] for run in runs]


def scorings_of(groups: list) -> list[list[str]]:
    """The scorings to compare of each group: those that all runs hold, else the one that all of a group hold."""
    held = [[name for name in metrics.SCORINGS if all(name in metrics.scorings(r) for r in group)] for group in groups]
    if not all(held):
        raise cli.InputError("some runs of a group hold greedy answers alone, others expected scores alone")
    shared = [name for name in held[0] if name in held[-1]]
    return [shared or names[:1] for names in held]


def numbers_of(group: list, scorings: list[str], resample: bool = False) -> dict[str, np.ndarray]:
    """By key a row for each run: its number, and with `resample` those in corpora of other speakers, where it has them.

    Scores of a second scoring are called expected_..., as in metrics.json.
    """
    found = {}
    for scoring in scorings:
        each = [metrics.score(run, scoring, resample) for run in group]
        for key in each[0][0]:
            values = np.array([[numbers[key], *samples.get(key, ())] for numbers, samples, _ in each])
            if scoring == scorings[0]:
                found[key] = values
            elif key.startswith(prompts.SCORES):
                found[f"{scoring}_{key}"] = values
    return {key: values for key, values in found.items() if key not in COUNTS}


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def spread(group: list) -> tuple[list[str], cli.Rows]:
    """How much runs differ: columns and rows; a number is over the runs that have it."""
    rows = []
    for key, values in numbers_of(group, scorings_of([group])[0]).items():
        values = values[~np.isnan(values)]
        if len(values):
            deviation = f"{values.std(ddof=1):.3f}" if len(values) > 1 else "-"
            mean, least, most = (f"{number:.3f}" for number in (values.mean(), values.min(), values.max()))
            rows.append((key, [mean, deviation, least, most, str(len(values))]))
    return ["mean", "std", "min", "max", "runs"], rows


def differences(groups: list) -> tuple[list[str], cli.Rows]:
    """The difference of two groups' means: columns and rows; without what is nan for a run, or most resamples.

    Raises InputError where speakers are not named.
    """
    found = [numbers_of(group, names, resample=True) for group, names in zip(groups, scorings_of(groups))]
    several, rows = min(map(len, groups)) > 1, []
    for key in found[0]:
        ours, theirs = (numbers[key] for numbers in found)
        means = ours.mean(axis=0), theirs.mean(axis=0)
        difference = means[0] - means[1]  # first of the runs, then in each corpus of the same speakers
        low, high = metrics.interval(difference[1:])
        if not math.isnan(low):
            texts = [f"{means[0][0]:.3f}", f"{means[1][0]:.3f}", f"{difference[0]:+.3f}"]
            texts += [f"{low:+.3f}", f"{high:+.3f}", pvalue_text(difference[1:])]
            rows.append((key, texts + (welch(ours[:, 0], theirs[:, 0]) if several else [])))
    if not rows:
        raise cli.InputError("the predictions name no speakers, or one alone: evaluate more utterances")
    names = ["A", "B", "A-B", "from", "to", "p"]
    return names + (["std A", "std B", "p, runs"] if several else []), rows


def pvalue_text(drawn: np.ndarray) -> str:
    """The bootstrap's p-value of a difference; with a sign where so many resamples cannot tell a smaller one."""
    pvalue = metrics.sign_pvalue(drawn)
    return f"{'≤ ' if pvalue <= 2 / np.isfinite(drawn).sum() else ''}{pvalue:.3f}"


def welch(ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Standard deviation over the runs of both groups, and the p-value of Welch's t-test on their means, as texts."""
    from scipy import stats  # takes a second

    deviations = [f"{values.std(ddof=1):.3f}" for values in (ours, theirs)]
    if max(ours.std(), theirs.std()) <= metrics.SAME:  # no run differs from another: a test would divide by nothing
        return [*deviations, "-"]
    return [*deviations, f"{stats.ttest_ind(ours, theirs, equal_var=False).pvalue:.3f}"]


def decided_well(records: list[dict]) -> list[bool]:
    """Of each phone whether its detection is right; in the same order for all systems."""
    phones = zip(*metrics.phones_of(records))
    return [event in metrics.RIGHT for of in phones for *_, event in metrics.phone_columns(*of) if event]


def print_table(format: Format, caption: str, columns: list[str], rows: cli.Rows) -> None:
    """A table for the terminal, a spreadsheet or a paper, on stdout."""
    if format == "table":
        cli.show_table(caption, columns, rows)
        return
    lines = [["name", *columns], *([name, *texts] for name, texts in rows)]
    lines = [[cli.visible(text) for text in line] for line in lines]
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        return
    head, *body = (" & ".join(text.translate(LATEX) for text in line) + r" \\" for line in lines)
    print(rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\hline", head, r"\hline", *body, r"\hline", sep="\n")
    print(r"\end{tabular}")


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    if not settings.runs or len(settings.runs + settings.against) < 2:
        raise cli.InputError("two runs or more can be compared: name others of their kind, or one --against them")
    for paths in (settings.runs, settings.against):
        real = [path.resolve() for path in paths]
        if repeated := [path for path, own in zip(paths, real) if real.count(own) > 1]:
            raise cli.InputError(f"{repeated[0]} is named more than once: a group is of different runs")
    runs = read_runs(settings.runs + settings.against)
    groups = [runs[: len(settings.runs)], runs[len(settings.runs) :]]
    if settings.against:
        print_table(settings.format, "Difference", *differences(groups))
    else:
        print_table(settings.format, f"{len(runs)} runs", *spread(runs))
    if settings.format == "table":
        print()
        cli.say(*notes(settings, groups))


def notes(settings: Settings, groups: list) -> list[str]:
    """What the table shows, one note a line."""
    if not settings.against:
        return ["std: of the sample (n - 1). runs: those that have the number; a constant has no correlation."]
    said = [f"{letter}: {' '.join(map(str, of))}" for letter, of in zip("AB", (settings.runs, settings.against))]
    said += [f"{letter}: {' and '.join(names)} scores" for letter, names in zip("AB", scorings_of(groups))]
    said += [
        f"from, to: {metrics.LEVEL:.0%} interval of A - B, as p by a paired bootstrap over speakers, "
        f"{metrics.RESAMPLES:,} resamples; ≤: so many resamples cannot tell a smaller p."
    ]
    if min(map(len, groups)) > 1:
        said += ["std: over the runs of a group. p, runs: Welch's t-test, whether other seeds might have given this."]
    if max(map(len, groups)) == 1 and any(line["task"] == "MDD" for line in groups[0][0]):
        ours, theirs, pvalue = metrics.mcnemar(*(decided_well(group[0]) for group in groups))
        said += [
            f"Detection, phone by phone: A alone is right {ours:,} times, B alone {theirs:,} times; McNemar's exact "
            f"test, p = {pvalue:.2g} (it takes phones as independent, which those of one speaker are not quite)."
        ]
    return said


if __name__ == "__main__":
    cli.run_script("analysis.compare", main)
