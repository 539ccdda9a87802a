"""What evaluate.py writes: predictions.jsonl, an answer in each line, and metrics.json; both are checked when read."""

import json
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

import prompts
from support import cli, files


def _one_phone(text):
    if text.split() != [text]:
        raise ValueError("a phone is one or more characters without spaces")
    return text


def _distribution(probabilities):
    if abs(sum(probabilities) - 1) > 1e-3:
        raise ValueError(f"probabilities sum to {sum(probabilities):.4g}, not 1")
    return probabilities


Value = TypeVar("Value")
LOW, HIGH = prompts.SCORE_RANGE
VALUES = HIGH - LOW + 1  # of a score
Phones = list[Annotated[str, AfterValidator(_one_phone)]]
Score = Annotated[float, Field(ge=LOW, le=HIGH)]
Probability = Annotated[float, Field(ge=0)]
Distribution = Annotated[list[Probability], Field(min_length=VALUES, max_length=VALUES), AfterValidator(_distribution)]


class ByScore(files.Shape, Generic[Value]):
    """A value for each of prompts.SCORES."""

    accuracy: Value
    fluency: Value
    prosodic: Value
    total: Value


class Transcripts(files.Shape):
    """What should have been said, and the phones that raters heard."""

    word_transcript: str
    canonical: Phones
    heard: Phones


class Prediction(files.Shape):
    """A line of predictions.jsonl: the raw answer to one utterance in one task."""

    id: str
    output: str
    speaker: str | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    truncated: bool | None = None


class AssessmentLine(Prediction):
    task: Literal["APA"]
    reference: ByScore[Score]
    scores: ByScore[Distribution] | None = None


class DiagnosisLine(Prediction):
    task: Literal["MDD"]
    reference: Transcripts


Line = Annotated[AssessmentLine | DiagnosisLine, Field(discriminator="task")]


class Metrics(files.Shape):
    """metrics.json: what was evaluated, and numbers, null for those that do not exist."""

    model_config = ConfigDict(extra="allow")
    evaluated: str
    utterances: int
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-cli.LARGEST, le=cli.LARGEST)] | None]


def read(path, cut_off=False):
    """The lines of a predictions file, as dicts that hold what is there, no nulls.

    cut_off: of an evaluation that was stopped; there may be no line, or a last one without its end, which is left out.
    Raises InputError naming the first line that is not a prediction, or answers what another line does.
    """
    records = [line.model_dump(exclude_none=True) for line in files.read_lines(path, Line, cut_off)]
    if not records and not cut_off:
        raise cli.InputError(f"{path} is empty: evaluate the run first")
    first = {}
    for number, record in enumerate(records, 1):
        key = record["id"], record["task"]
        if first.setdefault(key, number) != number:
            raise cli.InputError(
                f"line {number} of {path} answers {ascii(key[0])} ({key[1]}), which line {first[key]} does: remove one"
            )
    return records


def read_metrics(path):
    """A metrics.json by key; None for a number that does not exist. Raises InputError."""
    try:
        return files.read_json(path, Metrics).model_dump()
    except cli.InputError as error:
        raise cli.InputError(f"{error}; evaluate the run first") from error


def write_metrics(rows, label, path):
    """metrics.json with flat keys; a number that does not exist is null, as JSON has no nan.

    rows: an evaluate.Row for each scoring. _low and _high: the interval. expected_: what expected scoring changes,
    where greedy scoring was done as well.
    """
    values = {"evaluated": label}
    for row in rows:
        ends = {f"{key}_{end}": v for key, pair in row.intervals.items() for end, v in zip(("low", "high"), pair)}
        found = row.numbers | ends
        if row is rows[0]:
            values |= found
        else:
            values |= {f"expected_{key}": v for key, v in found.items() if key.startswith(prompts.SCORES)}
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps({k: None if v != v else v for k, v in values.items()}, indent=2) + "\n")
