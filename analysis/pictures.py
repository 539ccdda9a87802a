"""What do a run's numbers look like?

For analysis.report, which shows these figures as SVG in its page and writes three of them beside it as PNG. Drawn by
matplotlib, a dependency already: no script, and 0.4 MB of pictures in the demo's page. What reacts to the mouse weighs
more before it draws anything, and needs scripts: plotly.min.js 4.8 MB (7.1.0), bokeh.min.js 1.3 MB (3.9.2), the bundle
of Vega that Altair's charts need 1.0 MB (vega 4.1.0).
"""

from collections import Counter
import io
import math

import matplotlib
from matplotlib.figure import Figure
import numpy as np

from analysis import phones, standing
import metrics
import prompts

LOW, HIGH = prompts.SCORE_RANGE
STYLE = matplotlib.rc_context(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same page for the same input
    }
)
# Colours of a PNG and of the page in light -> of the page in dark; matplotlib's own are those of curves.png
DARK = {
    "#000000": "#e6e9ed",
    "#ffffff": "#14171b",
    "#b0b0b0": "#4a535d",  # grid
    "#cccccc": "#4a535d",  # frame of a legend
    "#1f77b4": "#6cb2eb",  # C0
    "#ff7f0e": "#ffa24d",  # C1
    "#7f7f7f": "#9aa4ae",  # C7
    "#d5d9dd": "#363d45",
}
BLACK, WHITE, *_, BLUE, ORANGE, GREY, FLOOR = DARK
MARKERS = {  # of a number by its verdict: a good one is filled
    "better": {"color": BLUE, "markerfacecolor": BLUE},
    "unclear": {"color": BLUE, "markerfacecolor": WHITE},
    "not better": {"color": ORANGE, "markerfacecolor": WHITE},
    "": {"color": GREY, "markerfacecolor": GREY},
}
LARGEST = 12  # points, of the largest dot of a score panel: about what a score point has
# Phones that resemble each other stand together, so that common confusions lie near the diagonal; others come last
ORDER = "IY IH EY EH AE AA AO OW UH UW AH ER AY AW OY W Y R L M N NG P B T D K G CH JH F V TH DH S Z SH ZH HH".split()
OTHER, NOTHING = "another", "nothing"
FLOOR_LABEL, PAPER_LABEL, BEST_LABEL = "floor: needs no pronunciation", "paper", standing.BEST


@STYLE
def to_svg(figure):
    """A figure as an SVG file, bytes, whose colours follow the reader's choice of light or dark."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    names = {colour: f"--{colour[1:]}" for colour in DARK}
    for colour, name in names.items():
        text = text.replace(f": {colour}", f": var({name})")
    light, dark = (
        " ".join(f"{names[colour]}: {shown};" for colour, shown in colours)
        for colours in (zip(DARK, DARK), DARK.items())
    )
    style = (
        f"<style>:root {{ {light} fill: var({names[BLACK]}) }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    )
    return text.replace("<defs>", f"{style}<defs>", 1).encode()


# ----------------------------------------------------------------------------------------------------------------------
# The six numbers


@STYLE
def draw_standings(found, others=()):
    """Six numbers as dots with intervals, beside floors, paper and best published system.

    found: of standing.standings; others: of a second scoring of the same run.
    """
    figure = Figure(figsize=(5.2, 0.42 * len(found) + 1.1), layout="constrained")
    axis = figure.subplots()
    known = [end for s in found for end in (s.value, *s.interval, s.floor, s.paper) if not math.isnan(end)]
    left, right = min([0, *known]) - 0.02 * any(end < 0 for end in known), max([1, *known])
    for row, s in enumerate(found):
        worse = right if s.key in standing.LESS_IS_BETTER else left  # where the bar of the floor begins
        axis.barh(row, s.floor - worse, left=worse, height=0.7, color=FLOOR, label=FLOOR_LABEL)
        axis.plot(s.paper, row, "D", color=BLACK, markerfacecolor="none", zorder=3, label=PAPER_LABEL)
        axis.plot(s.best, row, "^", color=BLACK, markerfacecolor="none", zorder=3, label=BEST_LABEL)
        axis.plot(s.interval, (row, row), linewidth=2.5, color=MARKERS[s.verdict]["color"], solid_capstyle="butt")
        axis.plot(s.value, row, "o", markersize=8, markeredgewidth=2, **MARKERS[s.verdict])
        text = "-" if math.isnan(s.value) else standing.number(s.value, s.interval)
        axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center")
    for s in others:
        row = list(standing.NUMBERS).index(s.key) + 0.27
        axis.plot(s.interval, (row, row), linewidth=1, color=GREY)
        axis.plot(s.value, row, "o", markersize=4, color=GREY, label="expected scores")
    less = [f"{s.name}\n(less is better)" if s.key in standing.LESS_IS_BETTER else s.name for s in found]
    axis.set(yticks=range(len(found)), yticklabels=less, xlim=(left, right), ylim=(len(found) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    _legend(figure, axis, found)
    return figure


def _legend(figure, axis, found):
    verdicts = {
        "better": "better than the floor",
        "unclear": "unclear: the interval holds the floor",
        "not better": "not better",
    }
    for verdict, label in verdicts.items():
        if any(s.verdict == verdict for s in found):
            axis.plot(math.nan, math.nan, "o", markersize=8, markeredgewidth=2, label=label, **MARKERS[verdict])
    fields = {FLOOR_LABEL: "floor", PAPER_LABEL: "paper", BEST_LABEL: "best"}
    handles = {
        label: handle
        for handle, label in zip(*axis.get_legend_handles_labels())
        if label not in fields or not all(math.isnan(getattr(s, fields[label])) for s in found)
    }
    first = [label for label in handles if label in verdicts.values()]
    order = [*first, *(label for label in handles if label not in first)]
    figure.legend([handles[label] for label in order], order, loc="outside lower left", ncols=2, frameon=False)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def _four_panels():
    figure = Figure(figsize=(5.2, 5.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # inches; or a title touches the label above
    return figure


def _panel(axis, title, x_title, y_title):
    """Two axes from 0 to 10 and the line of equal values."""
    axis.plot((LOW, HIGH), (LOW, HIGH), "--", color=GREY, linewidth=1)
    limits = {"xlim": (LOW - 0.7, HIGH + 0.7), "ylim": (LOW - 0.7, HIGH + 0.7)}
    axis.set(title=title, xlabel=x_title, ylabel=y_title, aspect="equal", **limits)
    axis.set(xticks=range(LOW, HIGH + 1, 2), yticks=range(LOW, HIGH + 1, 2))


def _dots(axis, x, y, counts, largest, color):
    """Dots whose area is a count; the largest has this diameter in points.

    Diameters are rounded to half a point: an SVG holds each shape once, and is a tenth as long.
    """
    diameters = np.maximum(1, np.round(2 * largest * np.sqrt(np.divide(counts, max(counts, default=1)))) / 2)
    for diameter in np.unique(diameters):
        of_size = diameters == diameter
        dots = np.asarray(x)[of_size], np.asarray(y)[of_size]
        axis.plot(*dots, "o", markersize=diameter, color=color, markeredgewidth=0)


def _scores_panel(axis, assessed, name):
    pairs = [(human[name], predicted[name]) for predicted, human in assessed if predicted]
    pcc, _, mae, reason = metrics.correlation([p for _, p in pairs], [h for h, _ in pairs])
    cells, counts = np.unique(np.floor(np.reshape(pairs, (-1, 2)) + 0.5), axis=0, return_counts=True)
    title = f"{name}\n" + (f"no PCC: {reason}" if reason else f"PCC {pcc:.3f}, mean error {mae:.2f}")
    _panel(axis, title, "human", "predicted")
    _dots(axis, *cells.T, counts, LARGEST, BLUE)


@STYLE
def draw_scores(assessed):
    """Predicted against human scores, four panels. assessed: of metrics.paired; unparsed answers are left out."""
    figure = _four_panels()
    for axis, name in zip(figure.subplots(2, 2).flat, prompts.SCORES):
        _scores_panel(axis, assessed, name)
    return figure


def calibration_bins(expected, human):
    """Lower edge -> (utterances, mean expected score, mean human score), for the bins [0, 1), ... [9, 10] in use."""
    groups = {}
    for e, h in zip(expected, human):
        groups.setdefault(min(int(e), HIGH - 1), []).append((e, h))
    return {edge: (len(group), *np.mean(group, axis=0).tolist()) for edge, group in sorted(groups.items())}


@STYLE
def draw_calibration(bins):
    """Mean human against mean expected scores, four panels. bins: {score name: of calibration_bins}."""
    figure = _four_panels()
    for axis, (name, of_score) in zip(figure.subplots(2, 2).flat, bins.items()):
        counts, expected, human = zip(*of_score.values())
        _panel(axis, name, "mean expected", "mean human")
        _dots(axis, expected, human, counts, LARGEST, BLUE)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Phones


@STYLE
def draw_confusion(heard, written):
    """Which phone was written for which, as dots. heard, written: one list of phones per utterance.

    A dot's area is the share of the heard phone's occurrences; what was written right is left out. The last columns are
    phones that nobody was heard to say, and nothing. What was added has no such share and is not shown.
    """
    report = [entry for entry in phones.phone_report(heard, written) if entry["phone"]]
    rows = _ordered(entry["phone"] for entry in report)
    columns = [*rows, OTHER, NOTHING]
    shares = Counter()
    for entry in report:
        for phone, count in entry["confusions"]:
            column = NOTHING if phone is None else phone if phone in rows else OTHER
            shares[column, entry["phone"]] += count / entry["support"]
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    largest = max(shares.values(), default=math.nan)
    side = 5.2 * 72 / len(columns)  # points of a row or column, about
    x, y = ([columns.index(pair[of]) for pair in shares] for of in (0, 1))
    _dots(axis, x, y, list(shares.values()), side, ORANGE)
    axis.plot(range(len(rows)), range(len(rows)), ".", markersize=3, color=GREY)  # where what is right would be
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel="written", ylabel="heard")
    look = {"fontsize": min(9, side * 0.8), "parse_math": False}  # a phone is no formula
    axis.set_xticklabels(map(_printable, columns), rotation=90, **look)
    axis.set_yticklabels(map(_printable, rows), **look)
    axis.set(xlim=(-0.7, len(columns) - 0.3), ylim=(len(rows) - 0.3, -0.7))
    axis.grid(alpha=0.2)
    axis.set_axisbelow(True)
    axis.set_title(
        f"the largest dot: {largest:.0%} of a phone's occurrences" if shares else "no phone taken for another"
    )
    return figure


def _ordered(names):
    place = {phone: i for i, phone in enumerate(ORDER)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def _printable(name):
    return name if name.isprintable() else ascii(name)[1:-1]
