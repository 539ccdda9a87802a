"""Which mispronunciations are found, and which phones are taken for which?

    python -m analysis.phones out/predictions.jsonl

Prints each phone with its precision and recall, the most frequent confusions, and detection and the parts of the PER
beside what copying the sentence gives. --format csv or latex prints the phones alone. Needs no model.
"""

from collections import Counter
from dataclasses import dataclass
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


def count_pairs(heard: list[list[str]], written: list[list[str]]) -> Counter:
    """How often each (heard phone, written phone) stands in the alignments of `metrics.align`; None stands for a gap.

    heard, written: one list of phones per utterance.
    """
    return Counter(pair for utterance in zip(heard, written, strict=True) for pair in metrics.align(*utterance))


def phone_tables(records: list[dict]) -> list[evaluate.Table]:
    """Each phone with how well it is recognised, and the most frequent confusions of all: two tables."""
    _, heard, written = metrics.phones_of(records)
    pairs, phones, confusions = count_pairs(heard, written), [], []
    support, outputs = (Counter(pair[side] for pair in pairs.elements()) for side in (0, 1))
    for phone, count in support.most_common():  # phone None: what only the model wrote
        wrong = [(other, times) for (said, other), times in pairs.most_common() if said == phone != other]
        if phone:
            right = pairs[phone, phone]
            precision = f"{right / outputs[phone]:.3f}" if outputs[phone] else "-"
            instead = " ".join(f"{other or '-'}:{times}" for other, times in wrong[:INSTEAD])
            phones.append((phone, [str(count), precision, f"{right / count:.3f}", instead]))
        for other, times in wrong:
            share = f"{times / count:.3f}" if phone else "-"
            confusions.append((times, f"{phone or 'nothing'} > {other or 'nothing'}", share))
    confusions.sort(key=lambda row: -row[0])
    often = [(name, [str(times), share]) for times, name, share in confusions[:CONFUSIONS]]
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
