"""Is one system better than another, or is it chance?

    python -m analysis.compare a/predictions.jsonl b/predictions.jsonl

Prints the differences of two predictions files of the same utterances, with intervals and p-values of a paired
bootstrap over speakers, and McNemar's exact test on their decisions about each phone. Needs no model.
"""

from dataclasses import dataclass
import math
from pathlib import Path

from tyro.conf import Positional

import metrics
import prompts
from support import cli, predictions, screen

COMPARED = (
    *(f"{name}_{kind}" for kind in ("pcc", "mae") for name in prompts.SCORES),
    "wer",
    "per",
    "detection_precision",
    "detection_recall",
    "detection_f1",
    "phone_agreement_f1",
    "apa_unparsed",
    "mdd_unparsed",
)


@dataclass
class Settings:
    first: Positional[Path]  # predictions.jsonl of system A
    second: Positional[Path]  # predictions.jsonl of system B, on the same utterances


def read_pair(first, second):
    """The records of both files, in one order. Raises InputError where they are not of the same utterances."""
    records = [predictions.read(path) for path in (first, second)]
    ours, theirs = ({(r["id"], r["task"]): r["reference"] for r in lines} for lines in records)
    if ours != theirs:
        other = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise cli.InputError(
            f"{first} and {second}: {len(other)} outputs are in one alone, or have other references, such as "
            f"{' '.join(other[0])}: evaluate both on one corpus"
        )
    order = {key: i for i, key in enumerate(ours)}
    return [sorted(lines, key=lambda record: order[record["id"], record["task"]]) for lines in records]


def scorings(records):
    """Pairs of scorings to compare: those that both files have, else the one that each has."""
    ours, theirs = (metrics.scorings(lines) for lines in records)
    return [(name, name) for name in ours if name in theirs] or [(ours[0], theirs[0])]


def differences(records, scoring):
    """The table of differences, (caption, columns, rows), for a pair of scorings; None where speakers are not named."""
    samples = [metrics.resamples(lines, name) for lines, name in zip(records, scoring)]
    if not all(samples):
        return None
    ours, theirs = (metrics.score(lines, name)[0] for lines, name in zip(records, scoring))
    rows = []
    for key in COMPARED:
        difference = samples[0][key] - samples[1][key]  # (RESAMPLES,), of the same speakers
        low, high = metrics.interval(difference)
        if math.isnan(low):
            continue
        pvalue = metrics.sign_pvalue(difference)
        numbers = [f"{ours[key]:.3f}", f"{theirs[key]:.3f}", f"{ours[key] - theirs[key]:+.3f}"]
        rows.append((key, [*numbers, f"{low:+.3f}..{high:+.3f}", f"{pvalue:.3f}"]))
    names = [f"{letter} {name}" for letter, name in zip("AB", scoring)]
    return "Difference, by speakers", [*names, "difference", f"{metrics.LEVEL:.0%}", "p"], rows


def decided_well(records):
    """Of each phone whether its detection is right; in the same order for all systems."""
    phones = metrics.phones_of(metrics.paired(records)[1])
    return [event in metrics.RIGHT for utterance in metrics.detection_events(*phones) for event in utterance]


def main():
    settings = cli.parse(Settings, __doc__)
    records = read_pair(settings.first, settings.second)
    for scoring in scorings(records):
        table = differences(records, scoring)
        if table is None:
            raise cli.InputError(
                f"{settings.first} or {settings.second} names no speakers, or one alone: evaluate it again"
            )
        screen.show_table(*table)
    ours, theirs, pvalue = metrics.mcnemar(*map(decided_well, records))
    print()
    screen.say(
        f"A: {settings.first}",
        f"B: {settings.second}",
        f"difference A - B with its interval and p-value: paired bootstrap over speakers, {metrics.RESAMPLES:,} "
        f"resamples.",
        f"Detection, phone by phone: A alone is right {ours:,} times, B alone {theirs:,} times; McNemar's exact test, "
        f"p = {pvalue:.2g} (it takes phones as independent, which those of one speaker are not quite).",
    )


if __name__ == "__main__":
    cli.run_script("analysis.compare", main)
