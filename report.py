"""What does somebody see who wants to look, and listen, instead of reading a table?

One HTML file, without anything from elsewhere: the tables, predicted against human scores, phone confusions,
calibration, and the utterances with the largest errors, with their recordings. Text of models, corpora and file names
is escaped; the page's policy forbids loads from outside and every script but its own.
"""

import base64
import hashlib
import html
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import metrics
import prompts
from support import cli, files

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

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --muted: #57606a; --line: #d0d7de; --ink: #003a75;
  --cell: #000; --over: #fff; --substituted: #7a4200; --missing: #a1260d; --added: #0b5394; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e6e9ed; --muted: #a3adb8; --line: #3a424c; --ink: #7aa2e3;
    --cell: #fff; --over: #000; --substituted: #ffcf7a; --missing: #ffb3a3; --added: #a8cfff; --panel: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; } h3 { margin: 1.5rem 0 .5rem; } article h3 { margin: 0; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; } article th, article td { padding: .15rem .6rem; }
.scroll th:first-child { position: sticky; left: 0; min-width: 7rem; max-width: 45vw; background: var(--back); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: .3rem 0; cursor: pointer; }
th button::after { content: " ↕"; color: var(--muted); }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { display: block; width: 100%; max-width: 30rem; height: auto; }
figcaption, .note { color: var(--muted); font-size: .9rem; }
figure img { display: block; max-width: 100%; background: #fff; border-radius: .4rem; }
svg text { font-size: 9px; text-anchor: middle; fill: var(--text); }
svg g text { fill: var(--cell); } svg g .over { fill: var(--over); } .under { fill: var(--back); }
.frame { fill: none; stroke: var(--line); } .cell { fill: var(--ink); }
.equal { fill: none; stroke: var(--muted); stroke-dasharray: 3 3; }
article { margin: 1rem 0; padding: 1rem; background: var(--panel); border: 1px solid var(--line); }
article p { margin: .4rem 0; } audio { display: block; width: 24rem; max-width: 100%; margin: .5rem 0; }
pre { white-space: pre-wrap; margin: .4rem 0; padding: .5rem; border: 1px solid var(--line); }
.phones { display: flex; flex-wrap: wrap; gap: .25rem; list-style: none; padding: 0; margin: .4rem 0; }
.phones li { display: grid; justify-items: center; min-width: 2.2rem; padding: .1rem .3rem; line-height: 1.25;
  border: 1px solid var(--line); border-radius: .3rem; font-size: .85rem; }
.phones i { font-style: normal; } .phones b { font-weight: inherit; } .phones .same i { color: var(--muted); }
.phones li:not(.same) { font-weight: 600; }
.phones .substituted { color: var(--substituted); border: 2px solid; }
.phones .missing { color: var(--missing); border: 2px dashed; }
.phones .added { color: var(--added); border: 3px double; }
"""

SCRIPT = """
"use strict";
function sortKey(cell) {
  const text = cell.textContent.trim().replace(/\\u2212/g, "-").replace(/(\\d),(?=\\d{3})/g, "$1");
  const number = parseFloat(text);
  if (text === "" || text === "-") return [2, text];
  return Number.isNaN(number) ? [1, text] : [0, number];
}
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = Array.from(body.rows, (row) => [sortKey(row.cells[head.cellIndex]), row]);
  rows.sort(([a], [b]) => {
    if (a[0] !== b[0]) return a[0] === 2 || b[0] === 2 ? a[0] - b[0] : sign * (a[0] - b[0]);
    return sign * (a[0] === 0 ? a[1] - b[1] : a[1].localeCompare(b[1], "en", { numeric: true }));
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button.parentElement));
"""


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
        raise cli.InputError(f"--report {path} is not the name of an .html file")
    if os.path.lexists(path) and GENERATOR not in files.read_bytes(path)[:HEAD].decode(errors="replace"):
        raise cli.InputError(
            f"--report {path} is not a report of evaluate.py and would be replaced: choose another "
            f"name, or move it away"
        )
    files.make_folder(path.parent, "--report")


def write_report(path, title, tables, notes, records, utterances, figure5=None):
    """Write the report of one system as a single HTML file.

    tables: list of (caption, titles of the cells' columns, rows), rows being a list of (name, cell texts).
    notes: lines of text under the tables. records: lines of predictions.jsonl.
    utterances: {id: data.Utterance} for recordings and words; ids may be missing.
    figure5: path of a PNG, or None. Raises OSError where it cannot be read, RunError where the page cannot be written.
    """
    answers = read_answers(records)
    sections = {
        "Results": "".join(table(caption, ["name", *columns], rows) for caption, columns, rows in tables)
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        "Predicted and human scores": draw_scores(answers),
        "PER and accuracy score": embed_figure5(figure5) if figure5 else "",
        "Calibration of the expected scores": draw_calibration(answers),
        "Largest errors": show_largest(answers, utterances),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections.items() if content)
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    page = f"""<!DOCTYPE html>
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
    with files.whole(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # an output may hold half a surrogate pair


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


def embed_figure5(path):
    return f"""<figure><img src="{_data_uri("image/png", Path(path).read_bytes())}" alt="Two scatter plots: PER of each
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
        parts.append(f"speaker {utterance.speaker} ({utterance.gender}, {utterance.age} years)")
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
