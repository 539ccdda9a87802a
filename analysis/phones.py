"""Which mispronunciations are found, and which phones are taken for which?

    python -m analysis.phones out/predictions.jsonl

Prints detection and the parts of the PER beside what copying the sentence gives, and the most frequent confusions;
writes each phone with its precision and recall to phones.tsv beside the predictions. Needs no model.
"""

from collections import Counter
from dataclasses import dataclass
import math
import os
from pathlib import Path

from tyro.conf import Positional

import evaluate
import metrics
from support import cli, files, predictions, screen

DETECTION = {  # the field's convention; what each is, in metrics.detection_scores
    "detection_f1": "F1",
    "detection_precision": "P",
    "detection_recall": "R",
    "detection_far": "FAR",
    "detection_frr": "FRR",
    "detection_der": "DER",
    "per_sub": "PER: sub",
    "per_del": "del",
    "per_ins": "ins",
}
NOTES = [
    "Detection: found mispronunciations, the field's convention; FAR, FRR, DER: false acceptance, false rejection, "
    "diagnosis error.",
    "says everything right: writing what should have been said, without listening.",
]
INSTEAD = 4  # confusions shown of one phone
CONFUSIONS = 12  # the most frequent ones are printed
COLUMNS = ["heard", "precision", "recall", "written instead (-: nothing)"]
HEAD = "\t".join(["phone", *COLUMNS]) + "\n"  # first line of phones.tsv


@dataclass
class Settings:
    predictions: Positional[Path]  # predictions.jsonl of evaluate.py


def phone_report(heard, written):
    """For each phone, by the alignment of `metrics.align`: how often it was heard, precision, recall, its confusions.

    heard, written: one list of phones per utterance. Returns a list of dicts with phone, support, precision, recall
    and confusions [(written phone or None, count)], the most frequent phone first; phone None stands for what only the
    model wrote.
    """
    pairs = Counter(pair for utterance in zip(heard, written, strict=True) for pair in metrics.align(*utterance))
    support, outputs = Counter(), Counter()
    for (phone, output), count in pairs.items():
        support[phone] += count
        outputs[output] += count
    return [
        {
            "phone": phone,
            "support": count,
            "precision": pairs[phone, phone] / outputs[phone] if outputs[phone] else math.nan,
            "recall": pairs[phone, phone] / count,
            "confusions": sorted(((b, n) for (a, b), n in pairs.items() if a == phone != b), key=lambda c: -c[1]),
        }
        for phone, count in support.most_common()
    ]


def phone_tables(records):
    """Each phone with how well it is recognised, and the most frequent confusions of all: two tables."""
    _, heard, written = metrics.phones_of(metrics.paired(records)[1])
    report = phone_report(heard, written)
    phones, pairs = [], []
    for entry in report:
        instead = " ".join(f"{written or '-'}:{count}" for written, count in entry["confusions"][:INSTEAD])
        if entry["phone"]:
            texts = screen.cells(entry, ("precision", "recall"))
            phones.append((entry["phone"], [str(entry["support"]), *texts, instead]))
        for written, count in entry["confusions"]:
            share = f"{count / entry['support']:.3f}" if entry["phone"] else "-"
            pairs.append((f"{entry['phone'] or 'nothing'} > {written or 'nothing'}", count, share))
    often = sorted(pairs, key=lambda pair: -pair[1])[:CONFUSIONS]
    return [
        ("Phones", COLUMNS, phones),
        (
            "Phones heard > written most often",
            ["times", "share"],
            [(name, [str(n), share]) for name, n, share in often],
        ),
    ]


def check_path(path):
    """Raises InputError where something would be replaced that is not an earlier phones.tsv."""
    if os.path.lexists(path) and not files.read_bytes(path).startswith(HEAD.encode()):
        raise cli.InputError(f"{path} would be replaced, and this command did not write it: move it away")


def main():
    settings = cli.parse(Settings, __doc__)
    path = settings.predictions.parent / "phones.tsv"
    check_path(path)
    records = predictions.read(settings.predictions)
    transcribed = [record for record in records if record["task"] == "MDD"]
    numbers, _ = metrics.score(transcribed)
    row = evaluate.Row("this run", None, numbers, metrics.intervals(transcribed))
    phones, confusions = phone_tables(records)
    rows = screen.with_halves([row, evaluate.copying_floor(records)], DETECTION)
    screen.show_table("Detection", list(DETECTION.values()), rows, own=1)
    screen.show_table(*confusions)
    print()
    screen.say(*NOTES, "±: half of the interval.")
    with files.whole(path) as temporary:
        lines = ["\t".join([phone, *texts]) + "\n" for phone, texts in phones[2]]
        temporary.write_text(HEAD + "".join(lines), encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    cli.run_script("analysis.phones", main)
