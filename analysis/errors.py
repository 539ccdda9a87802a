"""Which utterances are worst, and what happened to each of their phones?

For analysis.report, which shows them.
"""

from dataclasses import dataclass
import math
import re

import metrics
import prompts
from support import cli

LOW, HIGH = prompts.SCORE_RANGE
SIGNS = {
    "right": "",
    "false alarm": "!",
    "miss": "?",
    "found": "✓",
    "found, as another phone": "≈",
    "added, counts in the PER alone": "+",
}


RAW = 400  # characters of an unparsed output
AUDIO_TYPES = {
    rb"RIFF....WAVE": "audio/wav",
    rb"fLaC": "audio/flac",
    rb"OggS": "audio/ogg",
    rb"ID3|\xff[\xe0-\xff]": "audio/mpeg",
}  # by what a file begins with


@dataclass
class Answers:
    """What was answered to one utterance, beside what humans say about it."""

    id: str
    apa: dict | None  # lines of predictions.jsonl; None: there is none
    mdd: dict | None
    predicted: dict | None  # score name -> 0-10; None: missing or unparsed
    transcripts: dict | None
    columns: list  # of `phone_columns`; empty without an MDD answer
    per: float  # nan where no phone was heard
    error: float  # by which the utterances are ordered


def read_answers(records):
    """The lines of predictions.jsonl as one Answers per utterance, in their order.

    The error is the absolute error in total score plus the PER. An unparsed output is as wrong as it can be in score
    (10 points), and an empty transcript in phones; a line that is missing adds nothing.
    """
    lines = {}
    for record in records:
        lines.setdefault(record["id"], {})[record["task"]] = record
    return [_read_answers(id, by_task.get("APA"), by_task.get("MDD")) for id, by_task in lines.items()]


def _read_answers(id, apa, mdd):
    predicted, transcripts, columns, per, error = None, None, [], math.nan, 0.0
    if apa:
        predicted = expected_scores(apa) or prompts.parse_output("APA", apa["output"])
        error = abs(predicted["total"] - apa["reference"]["total"]) if predicted else float(HIGH - LOW)
    if mdd:
        transcripts = prompts.parse_output("MDD", mdd["output"])
        written = metrics.normalise_phones(transcripts["phoneme_transcript"]) if transcripts else []
        heard = mdd["reference"]["heard"]
        columns = phone_columns(mdd["reference"]["canonical"], heard, written)
        if heard:
            per = sum(a != b for a, b in metrics.align(heard, written)) / len(heard)
            error += per
    return Answers(id, apa, mdd, predicted, transcripts, columns, per, error)


def expected_scores(record):
    """Score name -> expectation over the probabilities of the values 0-10; None for a line without them."""
    if not record.get("scores"):
        return None
    return {name: metrics.expectation(record["scores"][name]) for name in prompts.SCORES}


def phone_columns(canonical, heard, written):
    """Three phone lists under each other: a list of (canonical, heard, written, what became of it), None for a gap.

    Phones stand as canonical-heard and heard-written are aligned in metrics.detection_counts; between two heard phones,
    what was left out shares a column with what was added, where they are aligned. There the counts take a third
    alignment, canonical-written, and may decide otherwise: in 34 of the 3,125 columns of the demo, seed 0.
    """
    left_out = _gaps((phone, said) for said, phone in metrics.align(canonical, heard))
    added = _gaps(metrics.align(heard, written))
    columns = []
    for (phone, said, missing), (_, output, extra) in zip(left_out, added, strict=True):
        columns += [(required, None, more) for required, more in metrics.align(missing, extra)]
        if phone is not None:
            columns.append((said, phone, output))
    return [(*column, kind_of(*column)) for column in columns]


def kind_of(canonical, heard, written):
    """What became of a phone, a key of SIGNS; None stands for no phone."""
    if canonical is None and heard is None:
        return "added, counts in the PER alone"
    if canonical == heard:
        return "right" if written == heard else "false alarm"
    if written == heard:
        return "found"
    return "miss" if written == canonical else "found, as another phone"


def _gaps(pairs):
    """An alignment with `heard` as (heard phone, its partner, what the other has before it), and a last None."""
    found, before = [], []
    for phone, other in pairs:
        if phone is None:
            before.append(other)
        else:
            found.append((phone, other, before))
            before = []
    return [*found, (None, None, before)]


# ----------------------------------------------------------------------------------------------------------------------
# What the page shows of an utterance


def show(answers, utterance):
    """One of the largest errors, as the template takes it. utterance: data.Utterance, None where it is not known."""
    reference = answers.mdd["reference"] if answers.mdd else {"word_transcript": f"utterance {answers.id}"}
    per = "-" if math.isnan(answers.per) else f"{answers.per:.3f}"
    facts = [answers.id, f"error {answers.error:.2f}", f"PER {per}"]
    facts += [f"speaker {utterance.speaker}"] if utterance else []
    audio, reason = read_audio(utterance) if utterance else (None, None)
    scores = []
    if answers.apa:
        human, predicted = answers.apa["reference"], answers.predicted
        scores = [
            (name, f"{human[name]:.3g}", f"{predicted[name]:.3g}" if predicted else "-") for name in prompts.SCORES
        ]
    return {
        "answers": answers,
        "title": utterance.text if utterance else reference["word_transcript"],
        "facts": ", ".join(facts),
        "audio": audio,
        "no_audio": reason,
        "scores": scores,
        "raw": [raw for task in prompts.TASKS if (raw := show_raw(task, getattr(answers, task.lower())))],
    }


def show_raw(task, record):
    """Why an answer is not shown: it is missing, or it could not be parsed and is shown as it is. None if parsed."""
    if record is None:
        return {"title": f"No {task} answer."}
    if prompts.parse_output(task, record["output"]):
        return None
    text, cut = record["output"], ", cut off at the length limit" if record.get("truncated") else ""
    length = f"the first {RAW} of {len(text):,} characters" if len(text) > RAW else f"{len(text)} characters"
    return {"title": f"{task} output, unparsed", "why": f"{cut} ({length}):", "text": text[:RAW]}


def read_audio(utterance):
    """A recording as ((MIME type, bytes), None), or (None, the reason why there is none)."""
    try:
        content = utterance.recording()
    except (OSError, cli.InputError) as error:
        return None, f"The recording cannot be read: {error}"
    kind = audio_type(content)
    if kind is None:
        return None, "The recording is of a type that is not played here (WAV, FLAC, Ogg and MP3 are)."
    return (kind, content), None


def audio_type(content):
    """MIME type of a sound file by its first bytes, or None."""
    return next((kind for start, kind in AUDIO_TYPES.items() if re.match(start, content, re.DOTALL)), None)
