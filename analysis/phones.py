"""Which mispronunciations are found, and which phones are taken for which?

    python -m analysis.phones out/predictions.jsonl

Prints each phone with its precision and recall, the most frequent confusions, and detection and the parts of the PER
beside what copying the sentence gives. --format csv or latex prints the phones alone. Needs no model.
"""

from collections import Counter
from dataclasses import dataclass
import math
from pathlib import Path

from tyro.conf import Positional

from analysis import compare
import evaluate
import metrics
from support import answers, cli

DETECTION = {  # the field's convention; what each is, in metrics.detection_scores
    "detection_f1": "detection F1",
    "detection_precision": "P",
    "detection_recall": "R",
    "detection_far": "FAR",
    "detection_frr": "FRR",
    "detection_der": "DER",
    "per_sub": "PER: sub",
    "per_del": "del",
    "per_ins": "ins",
}
NOTE = (
    "Detection: found mispronunciations, the field's convention; FAR, FRR, DER: false acceptance, false rejection, "
    "diagnosis error."
)
INSTEAD = 4  # confusions shown of one phone
CONFUSIONS = 12  # the most frequent ones are printed
COLUMNS = ["heard", "precision", "recall", "written instead (-: nothing)"]


@dataclass
class Settings:
    predictions: Positional[Path]  # predictions.jsonl of evaluate.py
    format: compare.Format = "table"


def phone_report(heard: list[list[str]], written: list[list[str]]) -> list[dict]:
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


def phone_tables(records: list[dict]) -> list[evaluate.Table]:
    """Each phone with how well it is recognised, and the most frequent confusions of all: two tables."""
    _, heard, written = metrics.phones_of(records)
    report = phone_report(heard, written)
    phones, pairs = [], []
    for entry in report:
        instead = " ".join(f"{written or '-'}:{count}" for written, count in entry["confusions"][:INSTEAD])
        if entry["phone"]:
            texts = [f"{entry[key]:.3f}".replace("nan", "-") for key in ("precision", "recall")]
            phones.append((entry["phone"], [str(entry["support"]), *texts, instead]))
        for written, count in entry["confusions"]:
            share = f"{count / entry['support']:.3f}" if entry["phone"] else "-"
            pairs.append((f"{entry['phone'] or 'nothing'} > {written or 'nothing'}", count, share))
    often = sorted(pairs, key=lambda pair: -pair[1])[:CONFUSIONS]
    often = [(name, [str(count), share]) for name, count, share in often]
    return [("Phones", COLUMNS, phones), ("Phones heard > written most often", ["times", "share"], often)]


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    transcribed = [record for record in answers.read(settings.predictions) if record["task"] == "MDD"]
    if not transcribed:
        cli.say(f"{settings.predictions} holds scores alone: there are no phones to tell of")
        return
    phones, confusions = phone_tables(transcribed)
    compare.print_table(settings.format, *phones)
    if settings.format == "table":
        rows = evaluate.make_row("this run", transcribed), evaluate.copying_floor(transcribed)
        cli.show_table(*confusions)
        cli.show_table(*evaluate.make_table("Detection", DETECTION, rows), own=1)
        print()
        cli.say(NOTE, evaluate.CANONICAL, "±: half of the interval.")


if __name__ == "__main__":
    cli.run_script("analysis.phones", main)
