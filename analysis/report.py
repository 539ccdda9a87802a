"""What does somebody see who wants to look, and listen, instead of reading a table?

    python -m analysis.report out/

Writes report.html for an evaluated folder, one file without anything from elsewhere: where the run stands, predicted
against human scores, phones, and the utterances with the largest errors, with their recordings; beside it the pictures
results.png, scores.png and confusion.png. Needs no model. The page shows what the files hold, and its date is that of
predictions.jsonl, so the same files give the same page. Text of models and corpora is escaped; the page's policy
forbids scripts and loads.
"""

import base64
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
import io
import json
import math
from pathlib import Path

import jinja2
import numpy as np
from tyro.conf import Positional

from analysis import floors, phones, pronunciations
import data
import evaluate
import metrics
import prompts
from support import answers, cli, files
from support import run as runs
from support.later import when_used

with when_used():
    import matplotlib
    from matplotlib import figure as figures

PAGE, PICTURES = "report.html", ("results.png", "scores.png", "confusion.png")
TEMPLATE = Path(__file__).with_suffix(".jinja")
SHOWN = 40  # utterances with the largest errors
FIRST = 10  # of them, that are not folded away
RAW = 400  # characters of an unparsed output that are shown
LOW, HIGH = prompts.SCORE_RANGE


@dataclass(kw_only=True)
class Settings(evaluate.CorpusSettings):
    """The corpus is needed for recordings and floors of the scores."""

    run: Positional[Path]  # folder with predictions.jsonl of evaluate.py
    output: Path | None = None  # folder for the page and its pictures; default: that one


def read_corpus(settings: Settings, records: list[dict], evaluation: evaluate.Evaluation) -> tuple[list, list, list]:
    """The utterances that were evaluated, the train part, and notes on why either is missing.

    Raises InputError only for a corpus that the user named: a page without recordings is better than none.
    """
    tested = []
    try:
        if not (settings.data or getattr(evaluation.training, "data", None)):
            raise cli.InputError("the corpus is not known, give --data.")
        folder, asked = evaluate.choose_corpus(evaluation, settings)
        tested = floors.find_utterances(records, folder, asked)
        return tested, evaluate.read_corpus(folder, replace(asked, split="train")), []
    except cli.InputError as error:
        if settings.data and not tested:
            raise
        return tested, [], [f"Without {'' if tested else 'recordings and '}floors of the scores: {error}"]


# ----------------------------------------------------------------------------------------------------------------------
# Where a run stands: beside what needs no pronunciation, beside the paper, beside what others report

NUMBERS = {f"{name}_pcc": name for name in prompts.SCORES} | {"detection_f1": "detection F1", "per": "PER"}
LESS_IS_BETTER = {"per"}
# What others report on the same test part, in the order of NUMBERS; F1 is detection, by the field's convention. Those
# with a dagger are given the sentence that should be read, which makes scoring easier and a low PER nearly free:
# copying it has a PER of 0.03. F1 of Joint-CAPT-L1 and HMamba: HMamba, Table 3.
PUBLISHED = {
    "GOPT (2022) \u2020": (0.714, 0.753, 0.760, 0.742, math.nan, math.nan),
    "Joint-CAPT-L1 (2023)": (0.719, 0.775, 0.773, 0.743, 0.415, 0.099),
    "MultiPA (2024)": (0.705, 0.772, 0.763, 0.730, math.nan, math.nan),
    "Qwen2-Audio LoRA (2025)": (0.69, 0.74, 0.73, 0.72, math.nan, math.nan),
    "HMamba (2025) \u2020": (0.807, 0.848, 0.843, 0.829, 0.6385, 0.0272),
}
BEST = "HMamba (2025) \u2020"  # in every number of the list
VERDICTS = {
    "better": "better than the floor",
    "unclear": "not clearly better than the floor",  # which lies in the interval
    "not better": "not better than the floor",
}


@dataclass
class Standing:
    """One number of a run and what it is to be compared with; nan where there is no such number."""

    key: str  # of NUMBERS
    value: float
    interval: tuple[float, float]
    floor: float  # the best number of any floor
    floor_name: str
    paper: float
    best: float  # of BEST

    @property
    def verdict(self) -> str:
        """Whether it is better than its floor: of VERDICTS; "" without a floor or a number.

        Without an interval the number alone decides.
        """
        if math.isnan(self.floor) or math.isnan(self.value):
            return ""
        sign = -1 if self.key in LESS_IS_BETTER else 1
        ends = [sign * (end - self.floor) for end in (self.value, *self.interval) if not math.isnan(end)]
        if ends[0] <= 0:
            return "not better"
        return "better" if min(ends) > 0 else "unclear"


def standings(row: evaluate.Row, floor_rows: list[evaluate.Row], papers_corpus: bool) -> list[Standing]:
    """A Standing for each of NUMBERS. papers_corpus: whether the published numbers are of these utterances."""
    best = dict(zip(NUMBERS, PUBLISHED[BEST])) if papers_corpus else {}
    found = []
    for key in NUMBERS:
        known = [(floor.numbers[key], floor.label) for floor in floor_rows if not math.isnan(floor.numbers[key])]
        floor = (min if key in LESS_IS_BETTER else max)(known, default=(math.nan, ""))
        value, interval = row.numbers[key], row.intervals.get(key, (math.nan, math.nan))
        found.append(Standing(key, value, interval, *floor, row.near.get(key, math.nan), best.get(key, math.nan)))
    return found


def sentence(found: list[Standing]) -> str:
    """Which numbers are better than their floors: the one thing to know of a run."""
    parts = []
    for verdict, text in VERDICTS.items():
        for floor in dict.fromkeys(s.floor_name for s in found if s.verdict == verdict):
            names = [NUMBERS[s.key] for s in found if (s.verdict, s.floor_name) == (verdict, floor)]
            parts.append(f"{text} '{floor}' in {', '.join(names)}")
    return f"This run is {'; '.join(parts)}." if parts else "Nothing could be compared with a floor."


# ----------------------------------------------------------------------------------------------------------------------
# Pictures

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a phone is no formula
    "savefig.dpi": 200,
}
BLUE, ORANGE, GREY, FLOOR = "#1f77b4", "#ff7f0e", "#7f7f7f", "#d5d9dd"
MARKERS = {  # of a number by its verdict: a good one is filled
    "better": {"color": BLUE, "markerfacecolor": BLUE},
    "unclear": {"color": BLUE, "markerfacecolor": "white"},
    "not better": {"color": ORANGE, "markerfacecolor": "white"},
    "": {"color": GREY, "markerfacecolor": GREY},
}
LARGEST = 12  # points, of the largest dot of a score panel: about what a score point has
OTHER, NOTHING = "another", "nothing"


def draw_standings(found: list[Standing]) -> "figures.Figure":
    """Six numbers as dots with intervals, beside floors, paper and best published system."""
    figure = figures.Figure(figsize=(5.2, 0.42 * len(found) + 1.1), layout="constrained")
    axis = figure.subplots()
    known = [end for s in found for end in (s.value, *s.interval, s.floor, s.paper) if not math.isnan(end)]
    left, right = min([0, *known]) - 0.02 * any(end < 0 for end in known), max([1, *known])
    for row, s in enumerate(found):
        worse = right if s.key in LESS_IS_BETTER else left  # where the bar of the floor begins
        if not math.isnan(s.floor):
            axis.barh(row, s.floor - worse, left=worse, height=0.7, color=FLOOR, label="floor: needs no pronunciation")
        for value, shape, label in ((s.paper, "D", "paper"), (s.best, "^", BEST)):
            if not math.isnan(value):
                axis.plot(value, row, shape, color="black", markerfacecolor="none", zorder=3, label=label)
        axis.plot(s.interval, (row, row), linewidth=2.5, color=MARKERS[s.verdict]["color"], solid_capstyle="butt")
        label = VERDICTS.get(s.verdict)
        axis.plot(s.value, row, "o", markersize=8, markeredgewidth=2, label=label, **MARKERS[s.verdict])
        ends = "" if math.isnan(s.interval[0]) else " [{:.2f}, {:.2f}]".format(*s.interval)
        text = "-" if math.isnan(s.value) else f"{s.value:.2f}{ends}"
        axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center")
    names = [NUMBERS[s.key] + "\n(less is better)" * (s.key in LESS_IS_BETTER) for s in found]
    axis.set(yticks=range(len(found)), yticklabels=names, xlim=(left, right), ylim=(len(found) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles))  # each once
    figure.legend(named.values(), named.keys(), loc="outside lower left", ncols=2, frameon=False)
    return figure


def draw_scores(rows: np.ndarray) -> "figures.Figure":
    """Predicted against human scores, four panels. rows: of metrics.assessment_rows; unparsed answers are left out."""
    figure = figures.Figure(figsize=(5.2, 5.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # inches; or a title touches the label above
    ticks, limits = range(LOW, HIGH + 1, 2), (LOW - 0.7, HIGH + 0.7)
    for axis, name, pair in zip(figure.subplots(2, 2).flat, prompts.SCORES, metrics.parsed(rows).T):
        numbers, (*_, reason) = metrics.score_numbers(*pair), metrics.correlation(*pair)
        title = f"no PCC:\n{reason}" if reason else "PCC {pcc:.3f}, spread {sd_ratio:.2f}".format(**numbers)
        cells, counts = np.unique(np.floor(pair[::-1].T + 0.5), axis=0, return_counts=True)
        axis.plot((LOW, HIGH), (LOW, HIGH), "--", color=GREY, linewidth=1)
        axis.scatter(*cells.T, s=LARGEST**2 * counts / max(counts, default=1), color=BLUE, linewidths=0)
        axis.set(title=f"{name}\n{title}", xlabel="human", ylabel="predicted", aspect="equal")
        axis.set(xticks=ticks, yticks=ticks, xlim=limits, ylim=limits)
    return figure


def draw_confusion(heard: list[list[str]], written: list[list[str]]) -> "figures.Figure":
    """Which phone was written for which, as dots. heard, written: one list of phones per utterance.

    A dot's area is the share of the heard phone's occurrences; what was written right is left out. The last columns are
    phones that nobody was heard to say, and nothing. What was added has no such share and is not shown.
    """
    support = Counter(phone for said in heard for phone in said)
    place = {phone: i for i, phone in enumerate(pronunciations.PHONES)}  # so common confusions lie near the diagonal
    rows = sorted(support, key=lambda phone: (place.get(phone, len(place)), phone))
    columns = [*rows, OTHER, NOTHING]
    shares = Counter()
    for (phone, other), count in phones.count_pairs(heard, written).items():
        if phone and phone != other:
            column = NOTHING if other is None else other if other in rows else OTHER
            shares[columns.index(column), rows.index(phone)] += count / support[phone]
    figure = figures.Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    side = 5.2 * 72 / len(columns)  # points of a row or column, about
    x, y = np.reshape(list(shares), (-1, 2)).T
    largest = max(shares.values(), default=1)
    axis.scatter(x, y, s=[side**2 * share / largest for share in shares.values()], color=ORANGE, linewidths=0)
    axis.plot(range(len(rows)), range(len(rows)), ".", markersize=3, color=GREY)  # where what is right would be
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel="written", ylabel="heard")
    axis.set_xticklabels(map(cli.visible, columns), rotation=90, fontsize=min(9, side * 0.8))
    axis.set_yticklabels(map(cli.visible, rows), fontsize=min(9, side * 0.8))
    axis.set(xlim=(-0.7, len(columns) - 0.3), ylim=(len(rows) - 0.3, -0.7))
    axis.grid(alpha=0.2)
    title = f"the largest dot: {largest:.0%} of a phone's occurrences" if shares else "no phone taken for another"
    axis.set_title(title)
    return figure


def draw(records: list[dict], found: list[Standing]) -> dict[str, bytes]:
    """The pictures by file name, as PNG; what there is nothing for is left out."""
    apa = metrics.assessment_rows(records, metrics.scorings(records)[0])
    _, heard, written = metrics.phones_of(records)
    with matplotlib.rc_context(STYLE):
        drawn = [
            draw_standings(found),
            draw_scores(apa) if len(apa) else None,
            draw_confusion(heard, written) if heard else None,
        ]
        shown = {}
        for name, figure in zip(PICTURES, drawn):
            if figure:
                file = io.BytesIO()
                figure.savefig(file, format="png")
                shown[name] = file.getvalue()
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# Utterances

SIGNS = {  # event of metrics.phone_columns -> its name here, and its sign
    "true_accept": ("right", ""),
    "false_reject": ("false alarm", "!"),
    "false_accept": ("miss", "?"),
    "correct_diagnosis": ("found", "✓"),
    "diagnosis_error": ("found, as another phone", "≈"),
    None: ("added, counts in the PER alone", "+"),
}


@dataclass
class Answers:
    """What was answered to one utterance, beside what humans say about it."""

    id: str
    title: str
    scores: list = field(default_factory=list)  # (name, human, predicted)
    words: str = ""  # that were written
    columns: list = field(default_factory=list)  # of metrics.phone_columns
    per: float = math.nan  # where no phone was heard
    error: float = 0.0  # by which the utterances are ordered
    unparsed: list = field(default_factory=list)  # lines of predictions.jsonl


def read_answers(records: list[dict], texts: dict[str, str]) -> list[Answers]:
    """What was answered to each utterance, that with the largest error first. texts: {id: what should be read}.

    The error is the absolute error in total score plus the PER. An unparsed output is as wrong as it can be in score
    (10 points), and an empty transcript in phones; a line that is missing adds nothing.
    """
    scoring, found = metrics.scorings(records)[0], {}
    for record in records:
        said, human = metrics.answer_of(record, scoring), record["reference"]
        entry = found.setdefault(record["id"], Answers(record["id"], texts.get(record["id"], record["id"])))
        if said is None:
            entry.unparsed.append(record)
        if record["task"] == "APA":
            entry.scores = [(name, human[name], said[name] if said else math.nan) for name in prompts.SCORES]
            entry.error += abs(said["total"] - human["total"]) if said else HIGH - LOW
            continue
        entry.title, entry.words = human["word_transcript"], said["word_transcript"] if said else ""
        (canonical,), (heard,), (written,) = metrics.phones_of([record])
        entry.columns = metrics.phone_columns(canonical, heard, written)
        if heard:
            entry.per = sum(a != b for a, b in metrics.align(heard, written)) / len(heard)
            entry.error += entry.per
    return sorted(found.values(), key=lambda entry: entry.error, reverse=True)


def recording(utterance: data.Utterance | None) -> tuple[str, str]:
    """A recording as a URI, and why there is none: one of the two is empty."""
    try:
        content = utterance.recording() if utterance else b""
    except (OSError, cli.InputError) as error:
        return "", f"The recording cannot be read: {error}"
    kind = "audio/flac" if content.startswith(b"fLaC") else "audio/wav"
    return (data_uri(kind, content) if content else ""), ""


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ----------------------------------------------------------------------------------------------------------------------
# The page


def facts(settings: Settings, records: list[dict], label: str) -> tuple[dict[str, str], str]:
    """What was evaluated, as {name: text}, and all settings that are known of it, as JSON text."""
    places = {"answers": settings.run / answers.SETTINGS, "training": settings.run / runs.MARK}
    known = {name: files.read_json(path, dict) for name, path in places.items() if path.is_file()}
    speakers = {record.get("speaker") for record in records} - {None}
    written = (settings.run / answers.WHOLE).stat().st_mtime
    found = {
        "model": known.get("answers", {}).get("model", "not known"),
        "answers": f"{label}, {datetime.fromtimestamp(written, UTC):%Y-%m-%d %H:%M} UTC",
        "utterances": f"{len({record['id'] for record in records}):,} of {len(speakers):,} speakers",
    }
    return found, json.dumps(known, indent=2)


SPREAD = {f"{name}_spearman": f"Spearman {name}" for name in prompts.SCORES}
SPREAD |= {f"{name}_sd_ratio": f"spread {name}" for name in prompts.SCORES}
NOTE = "Spearman: correlation of ranks. spread: standard deviation of the predicted scores over that of the human ones."


def make_tables(
    rows: list[evaluate.Row], floor_rows: list[evaluate.Row], records: list[dict], papers_corpus: bool
) -> tuple[list[evaluate.Table], list[evaluate.Table]]:
    """The tables of the page: those that are shown, and those that are folded."""
    heard, scored = ([row for row in floor_rows if not math.isnan(row.numbers[key])] for key in ("per", "total_mae"))
    *shown, pvalues = evaluate.tables(rows, floor_rows)
    shown.append(evaluate.make_table("Ranks and spread of the scores", SPREAD, [*rows, *scored]))
    shown.append(evaluate.make_table("Detection", phones.DETECTION, [*rows[:1], *heard]))
    folded = [pvalues, *phones.phone_tables(records)]
    if papers_corpus:
        published = [evaluate.Row(name, dict(zip(NUMBERS, values))) for name, values in PUBLISHED.items()]
        folded.append(evaluate.make_table("Published systems, on the same utterances", NUMBERS, published))
    return shown, [table for table in folded if table[2]]


def make_page(
    settings: Settings,
    records: list[dict],
    evaluation: evaluate.Evaluation,
    corpus: tuple[list, list, list],
) -> tuple[str, dict[str, bytes]]:
    """The page as HTML text, and its pictures by file name. corpus: of `read_corpus`."""
    tested, train, notes = corpus
    papers_corpus = evaluate.is_papers_corpus(records)
    rows = evaluate.rows_of(records, evaluation.label, evaluation.paper_row)
    floor_rows = floors.floor_rows(records, train, tested)
    found = standings(rows[0], floor_rows, papers_corpus)
    known = {utterance.id: utterance for utterance in tested}
    every = read_answers(records, {id: utterance.text for id, utterance in known.items()})
    pictures = draw(records, found)
    named, everything = facts(settings, records, evaluation.label)
    shown, folded = make_tables(rows, floor_rows, records, papers_corpus)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = template.render(
        signature=files.signature("analysis.report"),
        title=f"Pronunciation evaluation: {evaluation.label}",
        lead=sentence(found),
        facts=named,
        settings=everything,
        pictures={name.removesuffix(".png"): data_uri("image/png", content) for name, content in pictures.items()},
        papers_corpus=papers_corpus,
        best=BEST,
        notes=[*notes, *evaluate.explain(rows), phones.NOTE, floors.NOTE, NOTE],
        tables=shown,
        folded=folded,
        utterances=len(every),
        worst=[(entry, *recording(known.get(entry.id))) for entry in every[:SHOWN]],
        first=FIRST,
        longest=RAW,
        signs=SIGNS,
    )
    return text, pictures


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    folder = settings.output or settings.run
    records = answers.read(settings.run / answers.WHOLE)
    with files.own(folder, "analysis.report", PAGE, [PAGE, *PICTURES]):
        evaluation = evaluate.saved_evaluation(settings.run / answers.WHOLE)
        corpus = read_corpus(settings, records, evaluation)
        page, pictures = make_page(settings, records, evaluation, corpus)
        for name, content in {PAGE: page.encode(), **pictures}.items():
            with files.whole(folder / name) as temporary:
                temporary.write_bytes(content)
        cli.say(*corpus[2], f"written: {', '.join([PAGE, *pictures])} in {folder}")


if __name__ == "__main__":
    cli.run_script("analysis.report", main)
