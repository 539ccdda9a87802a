"""What does somebody see who wants to look, and listen, instead of reading a table?

    python -m analysis.report out/ --output report.html

Writes one HTML file of an evaluated folder, without anything from elsewhere: the tables of evaluate.py and the other
commands, predicted against human scores, phone confusions, calibration, and the utterances with the largest errors,
with their recordings. Needs no model. Text of models, corpora and file names is escaped; the page's policy forbids
loads from outside and every script but its own.
"""

import base64
from collections import Counter
from dataclasses import dataclass
import hashlib
import html
import math
import os
from pathlib import Path
import re
import shlex
import sys
from typing import Literal

from tyro.conf import Positional

from analysis import floors, phones
import evaluate
import metrics
import prompts
from support import cli, files, predictions

# The four PCCs and the PER that others report on the same test part. Those with a dagger are given the sentence that
# should be read, which makes scoring easier and a low PER nearly free: copying it has a PER of 0.03.
PUBLISHED = {
    "GOPT (2022) \u2020": (0.714, 0.753, 0.760, 0.742, None),
    "Joint-CAPT-L1 (2023)": (0.719, 0.775, 0.773, 0.743, 0.099),
    "MultiPA (2024)": (0.705, 0.772, 0.763, 0.730, None),
    "Qwen2-Audio LoRA (2025)": (0.69, 0.74, 0.73, 0.72, None),
    "HMamba (2025) \u2020": (0.807, 0.848, 0.843, 0.829, 0.0272),
}
PUBLISHED_NOTE = "Published systems: on the 2,500 utterances of speechocean762's test part; \u2020: given the sentence."
SHOWN = 40  # utterances with the largest errors
RAW = 400  # characters of an unparsed output
GENERATOR = '<meta name="generator" content="pronunciation evaluation, report.py">'  # marks what may be replaced
HEAD = 200  # bytes from the start in which the mark stands
LOW, HIGH = prompts.SCORE_RANGE
MARKS = {"same": "=", "substituted": "≠", "missing": "−", "added": "+"}
CELL, LEFT, TOP = 22, 36, 16  # of a plot, in its own units: one score point, margins
SIDE = CELL * (HIGH - LOW + 1)
AUDIO_TYPES = {
    rb"RIFF....WAVE": "audio/wav",
    rb"fLaC": "audio/flac",
    rb"OggS": "audio/ogg",
    rb"ID3|\xff[\xe0-\xff]": "audio/mpeg",
}  # by what a file begins with

STYLE, SCRIPT = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))


@dataclass
class Settings:
    run: Positional[Path]  # folder with predictions.jsonl and metrics.json of evaluate.py
    output: Path | None = None  # the .html file; default: report.html in that folder
    data: str | None = None  # corpus folder or hub id, for the recordings; default: that of the training
    data_revision: str | None = None  # of the hub id
    split: str = "test"  # the part that was evaluated


class Training(files.Shape):
    """settings.json of train.py, in a run folder or one of its epochs."""

    data: str
    strategy: Literal["lora", "unfreeze", "full"]
    data_revision: str | None = None
    epoch: int | None = None  # in the folder of an epoch


@dataclass
class Answers:
    """What was answered to one utterance, beside what humans say about it."""

    id: str
    apa: dict | None  # lines of predictions.jsonl; None: there is none
    mdd: dict | None
    predicted: dict | None  # score name -> 0-10; None: missing or unparsed
    transcripts: dict | None
    pairs: list  # (heard phone, predicted phone), None for a gap
    per: float  # nan where no phone was heard
    error: float  # by which the utterances are ordered


def check_path(path):
    """Raises InputError where a report cannot be written, or would replace something else than an earlier report."""
    if path.suffix != ".html":
        raise cli.InputError(f"--output {path} is not the name of an .html file")
    if os.path.lexists(path) and GENERATOR not in files.read_bytes(path)[:HEAD].decode(errors="replace"):
        raise cli.InputError(f"--output {path} is not a report and would be replaced: choose another name, or move it")
    files.make_folder(path.parent, "--output")


def read_evaluation(run):
    """What was evaluated in a folder: a run folder, or base/ or one epoch's in it, which is named as its evaluation."""
    label = predictions.read_metrics(run / "metrics.json")["evaluated"]
    places = [run / label, run, *([run.parent] if run.name == label else [])]
    found = [place / "settings.json" for place in places if (place / "settings.json").is_file()]
    return evaluate.Evaluation(label, run, None, files.read_json(found[0], Training) if found else None)


def read_utterances(evaluation, records, settings):
    """{id: data.Utterance} for recordings and words, and a note where there are none.

    Raises InputError only for a corpus that the user named: a page without recordings is better than none.
    """
    if not (settings.data or evaluation.training):
        return {}, ["Without recordings: the corpus is not known, give --data."]
    asked = evaluate.Settings(data=settings.data, data_revision=settings.data_revision, split=settings.split)
    try:
        corpus = evaluate.read_corpus(evaluation, asked)
        found = floors.find_utterances(records, corpus, settings.data or evaluation.training.data)
    except cli.InputError as error:
        if settings.data:
            raise
        return {}, [f"Without recordings: {error}"]
    return {utterance.id: utterance for utterance in found}, []


def result_tables(records, evaluation):
    """The tables of the page, (caption, columns, rows), and the notes below them."""
    rows = evaluate.rows_of(records, evaluation.label, evaluation.paper_row)
    copying = evaluate.copying_floor(records)
    keys = (*(f"{name}_pcc" for name in prompts.SCORES), "per")
    columns = {key: evaluate.TABLE_3[key] for key in keys}
    published = [
        (name, evaluate.cells({key: v for key, v in zip(keys, values) if v is not None}, columns))
        for name, values in PUBLISHED.items()
    ]
    tables = [
        evaluate.table_3(rows, [copying]),
        ("Published systems", list(columns.values()), published),
        phones.detection_table([copying, rows[0]]),
        ("Mean error, outputs", list(evaluate.OUTPUTS.values()), evaluate.with_intervals(rows, evaluate.OUTPUTS)),
        *phones.phone_tables(records),
    ]
    return tables, [*evaluate.explain(rows), *phones.NOTES[:1], PUBLISHED_NOTE]


def make_page(title, tables, notes, records, utterances, figure5=None, command=""):
    """The page as HTML text.

    tables: list of (caption, titles of the cells' columns, rows), rows being a list of (name, cell texts).
    notes: lines of text under the tables. records: lines of predictions.jsonl.
    utterances: {id: data.Utterance} for recordings and words; ids may be missing.
    figure5: content of a PNG, or None. command: what makes the page again.
    """
    answers = read_answers(records)
    sections = {
        "Results": "".join(table(caption, ["name", *columns], rows) for caption, columns, rows in tables)
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        "Predicted and human scores": draw_scores(answers),
        "PER and accuracy score": embed_figure5(figure5) if figure5 else "",
        "Calibration of the expected scores": draw_calibration(answers),
        "Largest errors": show_largest(answers, utterances),
        "This page again": f"<pre>{html.escape(command)}</pre>" if command else "",
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main><h1>{html.escape(title)}</h1>
{body}</main><script>{SCRIPT}</script></body>
</html>
"""


def _digest(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
    predicted, transcripts, pairs, per, error = None, None, [], math.nan, 0.0
    if apa:
        predicted = expected_scores(apa) or prompts.parse_output("APA", apa["output"])
        error = abs(predicted["total"] - apa["reference"]["total"]) if predicted else float(HIGH - LOW)
    if mdd:
        transcripts = prompts.parse_output("MDD", mdd["output"])
        phones = metrics.normalise_phones(transcripts["phoneme_transcript"]) if transcripts else []
        heard = mdd["reference"]["heard"]
        pairs = metrics.align(heard, phones)
        if heard:
            per = sum(a != b for a, b in pairs) / len(heard)
            error += per
    return Answers(id, apa, mdd, predicted, transcripts, pairs, per, error)


def expected_scores(record):
    """Score name -> expectation over the probabilities of the values 0-10; None for a line without them."""
    if not record.get("scores"):
        return None
    return {name: metrics.expectation(record["scores"][name]) for name in prompts.SCORES}


def table(caption, columns, rows):
    """A table whose column heads sort it. columns: titles; rows: list of (row head, texts of the other cells)."""
    head = "".join(f'<th scope="col"><button type="button">{html.escape(title)}</button></th>' for title in columns)
    body = "".join(_row(name, cells) for name, cells in rows)
    caption = html.escape(caption)
    return f"""<h3>{caption}</h3><div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def _row(name, cells):
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'


# ----------------------------------------------------------------------------------------------------------------------
# Plots


def _x(score):
    return LEFT + (score + 0.5) * CELL


def _y(score):
    return TOP + SIDE - (score + 0.5) * CELL


def plot(label, x_title, y_title, marks, caption):
    """Two axes from 0 to 10 around `marks` (SVG), with the line of equal values."""
    ticks, middle = "", TOP + SIDE / 2
    for score in range(LOW, HIGH + 1):
        ticks += f'<text x="{_x(score)}" y="{TOP + SIDE + 13}">{score}</text>'
        ticks += f'<text x="{LEFT - 10}" y="{_y(score) + 3}">{score}</text>'
    return f"""<figure><svg viewBox="0 0 {LEFT + SIDE + 2} {TOP + SIDE + 32}" role="img" aria-label="{label}">
<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>{ticks}
<path class="equal" d="M{_x(LOW)} {_y(LOW)}L{_x(HIGH)} {_y(HIGH)}"/>{marks}
<text x="{LEFT + SIDE / 2}" y="{TOP + SIDE + 28}">{x_title}</text>
<text x="10" y="{middle}" transform="rotate(-90 10 {middle})">{y_title}</text></svg>
<figcaption>{caption}</figcaption></figure>
"""


def draw_scores(answers):
    """Predicted against human scores, a heat map for each of the four."""
    scored = [answer for answer in answers if answer.predicted]
    unparsed = sum(answer.apa is not None for answer in answers) - len(scored)
    plots = ""
    for name in prompts.SCORES:
        predicted, human = [a.predicted[name] for a in scored], [a.apa["reference"][name] for a in scored]
        pcc, _, mae, reason = metrics.correlation(predicted, human)
        caption = f"<b>{name}</b>, " + (html.escape(f"no PCC: {reason}") if reason else f"PCC {pcc:.3f}")
        caption += "" if math.isnan(mae) else f", mean absolute error {mae:.2f}"
        label = f"{name}: predicted against human scores of {len(scored)} utterances"
        plots += plot(label, "human", "predicted", _cells(human, predicted), caption)
    return f"""<p class="note">Utterances: {len(scored):,}; a cell holds how many have these two scores. Predicted is
the expectation over the score values, rounded for its cell, where the run has their probabilities, else the number that
was written. Unparsed outputs without either, left out: {unparsed:,}.</p><div class="plots">{plots}</div>"""


def _cells(human, predicted):
    counts = Counter((int(h + 0.5), int(p + 0.5)) for h, p in zip(human, predicted))
    most = max(counts.values(), default=0)
    cells = ""
    for (h, p), count in sorted(counts.items()):
        shade = 0.1 + 0.9 * math.sqrt(count / most)  # the root keeps rare cells visible
        over = ' class="over"' if shade > 0.68 else ""  # black and white text meet there, at a contrast of 4.5
        place = f'x="{_x(h) - CELL / 2}" y="{_y(p) - CELL / 2}" width="{CELL}" height="{CELL}"'
        cells += (
            f'<g><title>human {h}, predicted {p}: {count}</title><rect class="under" {place}/>'
            f'<rect class="cell" fill-opacity="{shade:.2f}" {place}/>'
            f'<text{over} x="{_x(h)}" y="{_y(p) + 3}">{count}</text></g>'
        )
    return cells


def embed_figure5(content):
    return f"""<figure><img src="{_data_uri("image/png", content)}" alt="Two scatter plots: PER of each
utterance against its human and its predicted accuracy score"><figcaption>The paper's Figure 5.</figcaption></figure>"""


def calibration_bins(expected, human):
    """Lower edge -> (utterances, mean expected score, mean human score), for the bins [0, 1), ... [9, 10] in use."""
    groups = {}
    for e, h in zip(expected, human):
        groups.setdefault(min(int(e), HIGH - 1), []).append((e, h))
    return {
        edge: (len(group), sum(e for e, _ in group) / len(group), sum(h for _, h in group) / len(group))
        for edge, group in sorted(groups.items())
    }


def draw_calibration(answers):
    """Expected scores in bins against the mean human score of each bin; nothing for a run without probabilities."""
    scored = [(expected, a.apa["reference"]) for a in answers if a.apa and (expected := expected_scores(a.apa))]
    if not scored:
        return ""
    plots, rows = "", []
    for name in prompts.SCORES:
        bins, marks = calibration_bins([e[name] for e, _ in scored], [h[name] for _, h in scored]), ""
        for edge, (count, expected, human) in bins.items():
            marks += (
                f'<circle class="cell" cx="{_x(expected):.1f}" cy="{_y(human):.1f}" r="4"/>'
                f'<text x="{_x(edge + 0.5)}" y="{TOP - 5}">{count}</text>'
            )
            rows.append((f"{name}, {edge} to {edge + 1}", [f"{count:,}", f"{expected:.2f}", f"{human:.2f}"]))
        label = f"{name}: mean human score of {len(bins)} bins of the expected score"
        plots += plot(label, "mean expected", "mean human", marks, f"<b>{name}</b>")
    columns = ["expected score", "utterances", "mean expected", "mean human"]
    return f"""<p class="note">Utterances: {len(scored):,}, in bins one point wide of their expected score. On the
dashed line, humans give on average what is expected; the numbers above count the utterances in each bin.</p>
<div class="plots">{plots}</div><details><summary>The bins as a table</summary>
{table("Bins of the expected scores", columns, rows)}</details>"""


# ----------------------------------------------------------------------------------------------------------------------
# Phones and utterances


def show_largest(answers, utterances):
    """The utterances with the largest errors, to read and to hear."""
    worst = sorted(answers, key=lambda answer: answer.error, reverse=True)[:SHOWN]
    legend = show_phones([("AH", "AH"), ("DH", "D"), ("T", None), (None, "AH")])
    shown = "".join(show_utterance(rank, answer, utterances.get(answer.id)) for rank, answer in enumerate(worst, 1))
    return f"""<p>The {len(worst)} of {len(answers):,} utterances with the largest sum of two numbers: the absolute
error in total score, and the PER of the utterance. Unparsed scores count as 10 points, unparsed phones as an empty
transcript, a missing answer as 0.</p><p class="note">Phones, heard above and written below: = same, ≠ substituted,
− missing (heard, not written), + added (written, not heard):</p>{legend}{shown}"""


def show_utterance(rank, answer, utterance):
    """One of the largest errors. utterance: data.Utterance, or None for an id that the corpus does not have."""
    reference = answer.mdd["reference"] if answer.mdd else {"word_transcript": f"utterance {answer.id}"}
    parts = [answer.id, f"error {answer.error:.2f}", "PER -" if math.isnan(answer.per) else f"PER {answer.per:.3f}"]
    if utterance:
        parts.append(f"speaker {utterance.speaker}")
    content = f"<h3>{rank}. {html.escape(utterance.text if utterance else reference['word_transcript'])}</h3>"
    content += f'<p class="note">{html.escape(", ".join(parts))}</p>' + (show_player(utterance) if utterance else "")
    if answer.apa:
        human, predicted = answer.apa["reference"], answer.predicted
        rows = [
            _row(name, [f"{human[name]:.3g}", f"{predicted[name]:.3g}" if predicted else "-"])
            for name in prompts.SCORES
        ]
        head = "".join(f'<th scope="col">{title}</th>' for title in ("score", "human", "predicted"))
        content += f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    if answer.transcripts:
        content += f"<p><b>Words written:</b> {html.escape(answer.transcripts['word_transcript'])}</p>"
        content += show_phones(answer.pairs)
    return f"<article>{content}{show_raw('APA', answer.apa)}{show_raw('MDD', answer.mdd)}</article>\n"


def show_raw(task, record):
    """Why an answer is not shown: it is missing, or it could not be parsed and is shown as it is. "" if parsed."""
    if record is None:
        return f"<p><b>No {task} answer.</b></p>"
    if prompts.parse_output(task, record["output"]):
        return ""
    text, cut = record["output"], ", cut off at the length limit" if record.get("truncated") else ""
    length = f"the first {RAW} of {len(text):,} characters" if len(text) > RAW else f"{len(text)} characters"
    return f"<p><b>{task} output, unparsed</b>{cut} ({length}):</p><pre>{html.escape(text[:RAW])}</pre>"


def show_phones(pairs):
    items = ""
    for pair in pairs:
        heard, predicted = (html.escape(phone or "–") for phone in pair)
        kind = metrics.kind_of(*pair)
        items += f'<li class="{kind}" title="{kind}"><b>{heard}</b><i>{MARKS[kind]}</i><b>{predicted}</b></li>'
    return f'<ol class="phones">{items}</ol>'


def show_player(utterance):
    """An audio element with the recording inside, or the reason why there is none."""
    try:
        content = utterance.recording()
    except OSError as error:
        return f"<p>The recording cannot be read: {html.escape(str(error))}</p>"
    kind = audio_type(content)
    if kind is None:
        return "<p>The recording is of a type that is not played here (WAV, FLAC, Ogg and MP3 are).</p>"
    label = html.escape(f"Recording of {utterance.id}")
    return f'<audio controls preload="none" aria-label="{label}" src="{_data_uri(kind, content)}"></audio>'


def audio_type(content):
    """MIME type of a sound file by its first bytes, or None."""
    return next((kind for start, kind in AUDIO_TYPES.items() if re.match(start, content, re.DOTALL)), None)


def main():
    settings = cli.parse(Settings, __doc__)
    path = settings.output or settings.run / "report.html"
    evaluation = read_evaluation(settings.run)
    check_path(path)
    records = predictions.read(settings.run / "predictions.jsonl")
    utterances, missing = read_utterances(evaluation, records, settings)
    tables, notes = result_tables(records, evaluation)
    figure5 = settings.run / "figure5.png"
    page = make_page(
        f"Pronunciation evaluation: {evaluation.label}",
        tables,
        [*notes, *missing],
        records,
        utterances,
        files.read_bytes(figure5) if figure5.exists() else None,
        shlex.join(["python", "-m", "analysis.report", *sys.argv[1:]]),
    )
    with files.whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # an output may hold half a surrogate pair
    print("\n".join([*missing, f"report: {path}"]))


if __name__ == "__main__":
    cli.run_script("analysis.report", main)
