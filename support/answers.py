"""Answers on disk: predictions.jsonl, kept as it comes and whole in the end, and metrics.json; checked when read."""

from collections.abc import Iterable, Sequence
import json
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field

import prompts
from support import cli, files
from support.later import when_used
from support.run import Strategy

with when_used():
    from support import processes

WHOLE, PART, SETTINGS = GENERATED = ("predictions.jsonl", "predictions.jsonl.part", "predictions.settings.json")
METRICS, FIGURE = SCORED = ("metrics.json", "figure5.png")  # what scoring writes beside them

# ----------------------------------------------------------------------------------------------------------------------
# Shapes


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


class Writer(files.Shape):
    """What of predictions.settings.json is read again: which model wrote the answers, and to which corpus."""

    evaluated: str  # its label
    strategy: Strategy | None = None  # of its training; None for the unmodified model
    epoch: int | None = None
    data: str | None = None  # None: of an older version of this project
    data_revision: str | None = None
    data_reader: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read(path: Path, cut_off: bool = False) -> list[dict[str, Any]]:
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


def write_metrics(rows: list[Any], label: str, path: Path) -> None:
    """metrics.json with flat keys; a number that does not exist is null, as JSON has no nan.

    rows: an evaluate.Row for each scoring. _low and _high: the interval. expected_: what expected scoring changes,
    where greedy scoring was done as well.
    """
    values = {"written_by": files.signature("evaluate.py"), "evaluated": label}
    for row in rows:
        ends = {f"{key}_{end}": v for key, pair in row.intervals.items() for end, v in zip(("low", "high"), pair)}
        found = row.numbers | ends
        if row is rows[0]:
            values |= found
        else:
            values |= {f"expected_{key}": v for key, v in found.items() if key.startswith(prompts.SCORES)}
    files.write_json(path, {key: None if value != value else value for key, value in values.items()})


def writer(path: Path) -> Writer | None:
    """What wrote a saved predictions file; None where it is not known: then the file stands alone."""
    beside = path.with_name(SETTINGS)
    # While there is a part, the settings are those of the part
    known = path.name == WHOLE and beside.is_file() and not path.with_name(PART).exists()
    return files.read_json(beside, Writer) if known else None


Key = tuple[str, str]  # id of an utterance, task


class Answers:
    """predictions.jsonl of one evaluation, while it is generated; with `resume` it starts with what is there.

    asked: what is to be answered, in order; how: plain values that the answers depend on, the corpus' digest
    too: with others `resume` raises InputError, as for a broken file. Collective: every rank must make it, and call
    `start`, `add` and `finish`. Rank 0 writes.
    """

    def __init__(self, folder: Path, asked: Sequence[Key], how: dict[str, Any], resume: bool) -> None:
        self.asked, self.how = asked, how
        self.whole, self.part, self.settings = (folder / name for name in GENERATED)
        lines = _resumed(folder, how) if resume else {}
        self.lines = processes.gather(lines)[0]  # {key: JSON text}; rank 0 decides, before it writes

    def start(self) -> None:
        """Write what is there; before it an older evaluation of the folder is whole."""
        files.write_json(self.settings, {"written_by": files.signature("evaluate.py")} | self.how)
        self._write(self.part, self.lines.values())

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """Keep a process' answers, dicts as predictions.jsonl holds them."""
        new = [answer for part in processes.gather(answers) for answer in part]
        new = {_key(answer): json.dumps(answer, ensure_ascii=False) for answer in new}
        self.lines |= new
        if cli.process_rank() == 0:
            with open(self.part, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new.values()))

    def finish(self) -> list[dict[str, Any]]:
        """Write predictions.jsonl, and return it."""
        self._write(self.whole, [self.lines[key] for key in self.asked])
        if cli.process_rank() == 0:
            self.part.unlink()
        return [json.loads(self.lines[key]) for key in self.asked]

    def _write(self, path, lines):
        with files.whole(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _resumed(folder, how):
    """{key: JSON text} of the answers that an evaluation left."""
    whole, part, settings = (folder / name for name in GENERATED)
    path = part if part.exists() else whole
    if not path.exists():
        return {}
    same = settings.exists() and files.read_json(settings, dict) == {"written_by": files.signature("evaluate.py")} | how
    if not same:
        raise cli.InputError(
            f"--resume: the outputs in {folder} are of another model, corpus or setting: give the same ones, "
            f"or choose another --output"
        )
    return {_key(record): text for record, text in zip(read(path, cut_off=True), files.read_text(path).split("\n"))}


def _key(record):
    return record["id"], record["task"]
