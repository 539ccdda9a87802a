"""What does somebody see who wants to look, and listen, instead of reading a table?

    python -m analysis.report out/ --output report.html

Writes one HTML file of an evaluated folder, without anything from elsewhere: where the run stands, how it learned,
predicted against human scores, phones, and the utterances with the largest errors, with their recordings; beside it
results.png, scores.png and confusion.png. Needs no model. The page shows what the files hold, and its date is that of
predictions.jsonl, so the same files give the same page. Text of models, corpora and file names is escaped; the page's
policy forbids loads from outside and every script but its own.
"""

import base64
from dataclasses import dataclass, replace
from datetime import UTC, datetime
import hashlib
import json
import math
import os
from pathlib import Path
import shlex
import sys

import jinja2
from tyro.conf import Positional

from analysis import errors, floors, phones, standing
import evaluate
import metrics
import prompts
from support import answers, cli, files, log, predictions, screen
from support.later import when_used

with when_used():
    from analysis import pictures

SHOWN = 40  # utterances with the largest errors
FIRST = 10  # of them, that are not folded away
MARK = "pronunciation evaluation, report.py"  # in what may be replaced
GENERATOR = f'<meta name="generator" content="{MARK}">'
HEAD = 200  # bytes from the start in which the mark stands
PICTURES = ("results.png", "scores.png", "confusion.png")  # written beside the page
SECTIONS = {
    "run": "This run",
    "curve": "Learning curve",
    "scores": "Scores",
    "phones": "Phones",
    "errors": "Largest errors",
    "tables": "All numbers",
    "again": "This page again",
}

TEMPLATE, STYLE, SCRIPT = (
    Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".jinja", ".css", ".js")
)


@dataclass
class Settings:
    run: Positional[Path]  # folder with predictions.jsonl and metrics.json of evaluate.py
    output: Path | None = None  # the .html file; default: report.html in that folder
    data: str | None = None  # corpus folder or hub id, for recordings and floors; default: that of the training
    data_revision: str | None = None  # of the hub id
    split: str = "test"  # the part that was evaluated


def check_path(path):
    """Raises InputError where a report cannot be written, or would replace something else than an earlier report."""
    if path.suffix != ".html":
        raise cli.InputError(f"--output {path} is not the name of an .html file")
    for file in (path, *(path.with_name(name) for name in PICTURES)):
        if os.path.lexists(file) and MARK not in files.read_bytes(file)[:HEAD].decode(errors="replace"):
            raise cli.InputError(
                f"{file} is not of a report and would be replaced: choose another --output, or move it"
            )
    files.make_folder(path.parent, "--output")


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@dataclass
class Evaluated:
    """All that a page is made of."""

    evaluation: evaluate.Evaluation
    records: list  # lines of predictions.jsonl
    utterances: dict  # id -> data.Utterance, for recordings and words; ids may be missing
    rows: list  # of evaluate.Row, of every scoring
    floors: list  # of evaluate.Row
    notes: list  # why something is missing


def read(settings):
    """An evaluated folder as Evaluated.

    Raises InputError only for a corpus that the user named: a page without recordings is better than none.
    """
    evaluation = floors.read_evaluation(settings.run)
    records = predictions.read(settings.run / answers.WHOLE)
    rows = evaluate.rows_of(records, evaluation.label, evaluation.paper_row)
    known, notes = [evaluate.copying_floor(records), floors.silent_row(records)], []
    evaluated = Evaluated(evaluation, records, {}, rows, known, notes)
    if not (settings.data or evaluation.training):
        notes.append("Without recordings and floors of the scores: the corpus is not known, give --data.")
        return evaluated
    asked = evaluate.Settings(data=settings.data, data_revision=settings.data_revision, split=settings.split)
    try:
        corpus = evaluate.read_corpus(evaluation, asked)
        found = floors.find_utterances(records, corpus, settings.data or evaluation.training.data)
    except cli.InputError as error:
        if settings.data:
            raise
        notes.append(f"Without recordings and floors of the scores: {error}")
        return evaluated
    evaluated.utterances = {utterance.id: utterance for utterance in found}
    try:
        train = evaluate.read_corpus(evaluation, replace(asked, split="train"))
        known.append(floors.fitted_row(records, train, found))
    except cli.InputError as error:
        notes.append(f"Without floors of the scores: {error}")
    return evaluated


def facts(settings, evaluated):
    """What was evaluated, as {name: text}."""
    made_with = settings.run / answers.SETTINGS
    how = files.read_json(made_with, dict) if made_with.exists() else {}
    training = evaluated.evaluation.training.model_dump() if evaluated.evaluation.training else {}
    speakers = {record["speaker"] for record in evaluated.records if "speaker" in record}
    ids = {record["id"] for record in evaluated.records}
    source = settings.data or training.get("data", "not known")
    written = (settings.run / answers.WHOLE).stat().st_mtime
    trained = ("strategy", "rank", "epochs", "learning_rate", "seed")
    commits = [how.get("revision", training.get("revision")), settings.data_revision or training.get("data_revision")]
    of_model, of_data = (f" at {commit}" if commit else "" for commit in commits)  # a folder has none
    found = {
        "model": str(how.get("model", training.get("model", "not known"))) + of_model,
        "data": f"{source}{of_data} ({settings.split}), {len(ids):,} utterances of {len(speakers):,} speakers",
        "training": ", ".join(f"{key} {training[key]}" for key in trained if key in training) or "not known",
        "answers": ", ".join(f"{key} {how[key]}" for key in ("dtype", "max_new_tokens") if key in how) or "not known",
        "answered": datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Cell:
    text: str
    small: str = ""  # below it: an interval, or what the number is of


@dataclass
class Line:
    name: str
    cells: list[Cell]
    own: bool = False  # of this run: highlighted


@dataclass
class Table:
    caption: str
    columns: list[str]  # titles, that of the names first
    rows: list[Line]


def cell(value, interval=(math.nan, math.nan), mark=""):
    ends = "" if math.isnan(interval[0]) else f"[{interval[0]:.2f}, {interval[1]:.2f}]"
    return Cell("-" if math.isnan(value) else f"{value:.3f}{mark}", ends)


def plain(caption, columns, rows):
    """A table of texts. rows: list of (name, texts of the other cells)."""
    return Table(caption, columns, [Line(name, [Cell(text) for text in texts]) for name, texts in rows])


def row_table(caption, columns, rows, floors=()):
    """A table of evaluate.Row, those of the run first. columns: {key: title}."""
    lines = []
    for row in [*rows, *floors]:
        cells = []
        for key in columns:
            value = row.numbers.get(key, math.nan)
            close = abs(value - row.near.get(key, math.nan)) <= screen.CLOSE
            cells.append(cell(value, row.intervals.get(key, (math.nan, math.nan)), "*" if close else ""))
        lines.append(Line(row.label, cells, row in rows))
    return Table(caption, ["name", *columns.values()], lines)


def run_table(found, papers_corpus):
    """The six numbers of the first picture. found: of standing.standings."""
    lines = []
    for s in found:
        cells = [cell(s.value, s.interval), Cell(cell(s.floor).text, s.floor_of)]
        cells += [cell(s.paper), cell(s.best)] if papers_corpus else []
        lines.append(Line(s.name, cells))
    return Table(
        "Six numbers", ["number", "this run", "floor", *(["paper", "published"] if papers_corpus else [])], lines
    )


def make_tables(evaluated, found, papers_corpus):
    """The tables of the page by name. found: of standing.standings."""
    rows = evaluated.rows
    every = row_table("Table 3", evaluate.TABLE_3, rows, evaluated.floors)
    tables = {
        "run": run_table(found, papers_corpus),
        "all": every,
        "outputs": row_table("Mean error, outputs", evaluate.OUTPUTS, rows),
        "detection": row_table("Detection", phones.DETECTION, rows[:1], evaluated.floors[:2]),
    }
    if papers_corpus:
        papers = evaluate.papers_rows(rows).items()
        every.rows += [Line(name, [cell(value) for value in values]) for name, values in papers]
        published = [
            Line(name, [cell(math.nan if value is None else value) for value in values])
            for name, values in standing.PUBLISHED.items()
        ]
        tables["published"] = Table("Published systems", ["name", *standing.NUMBERS.values()], published)
    for name, (caption, columns, lines) in zip(("phones", "confusions"), phones.phone_tables(evaluated.records)):
        tables[name] = plain(caption, ["name", *columns], lines)
    return tables


def score_bins(every):
    """{score name: of pictures.calibration_bins}; empty for a run without probabilities. every: of read_answers."""
    scored = [(expected, a.apa["reference"]) for a in every if a.apa and (expected := errors.expected_scores(a.apa))]
    return {
        name: pictures.calibration_bins([e[name] for e, _ in scored], [h[name] for _, h in scored])
        for name in (prompts.SCORES if scored else ())
    }


def bin_table(bins):
    rows = [
        (f"{name}, {edge} to {edge + 1}", [f"{count:,}", f"{expected:.2f}", f"{human:.2f}"])
        for name, of_score in bins.items()
        for edge, (count, expected, human) in of_score.items()
    ]
    return plain("Bins", ["expected score", "utterances", "mean expected", "mean human"], rows)


def notes_of(evaluated, papers_corpus):
    """What the columns and rows are, one note a line."""
    row = evaluated.rows[0]
    notes = [
        "Scores are PCCs with human scores; the interval is a bootstrap over speakers.",
        "F1, P, R of Table 3: phone agreement by position, a reading that can give the paper's figures. found: F1: "
        "detection of mispronunciations, the field's convention. cut off: the length limit came before the end.",
        phones.NOTES[0],
    ]
    if row.near:
        notes.append(f"*: within {screen.CLOSE} of '{evaluate.paper_name(*row.paper_row)}'.")
    if papers_corpus:
        notes.append("Published systems: on the same utterances; \u2020: given the sentence that should be read.")
    return notes


def standing_notes(evaluated, found, papers_corpus):
    """What stands below the first picture."""
    used = {s.floor_of for s in found}
    meanings = {
        "says everything right": "writes what should have been said",
        "writes nothing": "writes no phone, so every phone is flagged",
        "pauses and energy": "a linear fit on the waveform that knows no phones",
    }
    floors = "; ".join(f"{label} ({meaning})" for label, meaning in meanings.items() if label in used)
    notes = [f"Floors, the best of: {floors}. A score that is not better shows nothing about pronunciation."]
    if not papers_corpus:
        notes.append(
            "The paper's and other published numbers are left out: they are on the 2,500 test utterances of "
            "speechocean762, and these are others."
        )
    else:
        notes.append(
            f"Best published: {standing.BEST}. It is given the sentence that should be read; that makes scoring "
            "easier, and a low PER nearly free."
        )
    return [*notes, *evaluated.notes]


# ----------------------------------------------------------------------------------------------------------------------
# The page


def data_uri(content):
    """(MIME type, bytes) as a URI; a filter of the template."""
    return f"data:{content[0]};base64,{base64.b64encode(content[1]).decode()}"


def draw(settings, evaluated, found):
    """The figures of the page by name, as matplotlib Figures; what there is nothing for is left out."""
    apa, mdd = metrics.paired(evaluated.records, metrics.scorings(evaluated.records)[0])
    others = [s for row in evaluated.rows[1:] for s in standing.standings(row, [], False) if s.name in prompts.SCORES]
    figures = {"standings": pictures.draw_standings(found, others)}
    if (settings.run / "log.jsonl").exists():
        figures["curve"] = log.curves(settings.run)
    if apa:
        figures["scores"] = pictures.draw_scores(apa)
    if mdd:
        figures["confusion"] = pictures.draw_confusion(*metrics.phones_of(mdd)[1:])
    return figures


def make_page(settings, evaluated, command):
    """The page as HTML text, and its figures by name. command: what makes the page again."""
    papers_corpus = evaluate.is_papers_corpus(evaluated.records)
    found = standing.standings(evaluated.rows[0], evaluated.floors, papers_corpus)
    figures = draw(settings, evaluated, found)
    tables = make_tables(evaluated, found, papers_corpus)
    every = errors.read_answers(evaluated.records)
    if bins := score_bins(every):
        figures["calibration"] = pictures.draw_calibration(bins)
        tables["bins"] = bin_table(bins)
    shown = {name: ("image/svg+xml", pictures.to_svg(figure)) for name, figure in figures.items()}
    if (settings.run / "figure5.png").exists():
        shown["figure5"] = "image/png", files.read_bytes(settings.run / "figure5.png")
    drawn = {"curve": "curve", "scores": "scores", "phones": "confusion"}  # sections that need their picture
    worst = sorted(every, key=lambda answer: answer.error, reverse=True)[:SHOWN]
    unparsed = evaluated.rows[0].numbers["apa_unparsed"]
    training = evaluated.evaluation.training
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    page = environment.from_string(TEMPLATE).render(
        generator=GENERATOR,
        policy=f"default-src 'none'; img-src data:; media-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'",
        style=STYLE,
        script=SCRIPT,
        title=f"Pronunciation evaluation: {evaluated.evaluation.label}",
        lead=standing.sentence(found),
        summary=standing.summary(found),
        facts=facts(settings, evaluated),
        contents={id: name for id, name in SECTIONS.items() if drawn.get(id, "standings") in figures},
        pictures=shown,
        standing_notes=standing_notes(evaluated, found, papers_corpus),
        tables=tables,
        notes=notes_of(evaluated, papers_corpus),
        scored=f"; unparsed answers, {unparsed:.1%}, are left out" if unparsed else "",
        utterances=f"{len(every):,}",
        worst=[errors.show(answer, evaluated.utterances.get(answer.id)) for answer in worst],
        first=FIRST,
        signs=errors.SIGNS,
        command=command,
        settings=json.dumps(training.model_dump(), indent=2) if training else "",
    )
    return page, figures


def _digest(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main():
    settings = cli.parse(Settings, __doc__)
    path = settings.output or settings.run / "report.html"
    check_path(path)
    evaluated = read(settings)
    page, figures = make_page(settings, evaluated, shlex.join(["python", "-m", "analysis.report", *sys.argv[1:]]))
    with files.whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # an output may hold half a surrogate pair
    written = [path.name]
    for name, figure in zip(PICTURES, ("standings", "scores", "confusion")):
        if figure in figures:
            with files.whole(path.with_name(name)) as temporary:
                figures[figure].savefig(temporary, format="png", dpi=150, metadata={"Software": MARK})
            written.append(name)
    print("\n".join([*evaluated.notes, f"written: {', '.join(written)} in {path.parent}"]))


if __name__ == "__main__":
    cli.run_script("analysis.report", main)
