"""How do numbers look beside the paper's, beside other systems, beside each other?

A table is (caption, column titles, rows), a row (name, cells): text that evaluate.py prints and report.py shows.
"""

import math
import statistics
from typing import Annotated

from pydantic import ConfigDict, Field

import metrics
import prompts
from support import cli, files

# Paper, Table 3 (speechocean762 test set): PCC of the four scores, WER, PER, and F1, precision, recall. The last three
# are defined as detection (4.3), but their values fit phone agreement; see metrics.py.
TABLE_3 = {
    "accuracy_pcc": "accuracy",
    "fluency_pcc": "fluency",
    "prosodic_pcc": "prosodic",
    "total_pcc": "total",
    "wer": "WER",
    "per": "PER",
    "phone_agreement_f1": "F1",
    "phone_agreement_precision": "P",
    "phone_agreement_recall": "R",
}
DETECTION = {  # the field's convention; what each is, in metrics.detection_scores
    "detection_f1": "F1",
    "detection_precision": "P",
    "detection_recall": "R",
    "detection_far": "FAR",
    "detection_frr": "FRR",
    "detection_der": "DER",
    "per_sub": "PER: sub",
    "per_del": "del",
    "per_ins": "ins",
}
OUTPUTS = {
    "accuracy_mae": "accuracy",
    "fluency_mae": "fluency",
    "prosodic_mae": "prosodic",
    "total_mae": "total",
    "apa_unparsed": "unparsed",
    "mdd_unparsed": "(MDD)",
    "apa_truncated": "cut off",
    "mdd_truncated": "(MDD)",
}
PAPER = {
    ("base", 0): (-0.041, -0.017, -0.0493, -0.104, 0.97, 0.792, 0.143, 0.154, 0.134),
    ("lora", 1): (0.547, 0.585, 0.567, 0.544, 0.15, 0.137, 0.686, 0.689, 0.682),
    ("lora", 2): (0.637, 0.726, 0.709, 0.662, 0.139, 0.118, 0.722, 0.725, 0.719),
    ("lora", 3): (0.656, 0.727, 0.711, 0.675, 0.14, 0.114, 0.724, 0.728, 0.721),
    ("lora", 4): (0.645, 0.733, 0.714, 0.668, 0.148, 0.121, 0.721, 0.723, 0.72),
    ("unfreeze", 1): (0.535, 0.559, 0.564, 0.55, 0.159, 0.199, 0.575, 0.579, 0.57),
    ("unfreeze", 2): (0.624, 0.668, 0.653, 0.634, 0.145, 0.154, 0.651, 0.651, 0.651),
    ("unfreeze", 3): (0.621, 0.669, 0.655, 0.637, 0.148, 0.15, 0.663, 0.665, 0.662),
    ("unfreeze", 4): (0.743, 0.717, 0.704, 0.666, 0.142, 0.142, 0.667, 0.671, 0.663),
}
PAPER_FIGURE_5 = {"human": -0.4463, "predicted": -0.3543}  # PCC of an utterance's PER with its accuracy score
CLOSE = 0.05  # a number this near to the paper's is marked
# The four PCCs and the PER that others report on the same test part. Those with a dagger are given the sentence that
# should be read, which makes scoring easier and a low PER nearly free: copying it has a PER of 0.03.
PUBLISHED = {
    "GOPT (2022) \u2020": (0.714, 0.753, 0.760, 0.742, None),
    "Joint-CAPT-L1 (2023)": (0.719, 0.775, 0.773, 0.743, 0.099),
    "MultiPA (2024)": (0.705, 0.772, 0.763, 0.730, None),
    "Qwen2-Audio LoRA (2025)": (0.69, 0.74, 0.73, 0.72, None),
    "HMamba (2025) \u2020": (0.807, 0.848, 0.843, 0.829, 0.0272),
}
COMPARED = (
    "wer",
    "per",
    "detection_precision",
    "detection_recall",
    "detection_f1",
    "phone_agreement_f1",
    "apa_unparsed",
    "mdd_unparsed",
)
INSTEAD = 4  # confusions shown of one phone
CONFUSIONS = 12  # the most frequent ones are printed


def result_tables(rows, floors):
    """Tables of some evaluated systems. rows, floors: lists of evaluate.Row; a floor needs no model."""
    strategies = {row.paper_row[0] for row in rows if row.paper_row} - {"base"} or {"lora"}
    paper = [
        (paper_name(*key), cells(dict(zip(TABLE_3, values)), TABLE_3))
        for key, values in PAPER.items()
        if key[0] in strategies or key[0] == "base"
    ]
    keys = (*(f"{name}_pcc" for name in prompts.SCORES), "per")
    others = [
        (name, cells({key: v for key, v in zip(keys, values) if v is not None}, TABLE_3))
        for name, values in PUBLISHED.items()
    ]
    return [
        ("Table 3", list(TABLE_3.values()), paper + others + _own([*floors, *rows], TABLE_3)),
        ("Detection", list(DETECTION.values()), _own([r for r in [*floors, *rows] if r.transcribed], DETECTION)),
        ("Mean error, outputs", list(OUTPUTS.values()), _own(rows, OUTPUTS)),
    ]


def _own(rows, columns):
    """The rows, each with its interval where there is one."""
    lines = []
    for row in rows:
        near = dict(zip(TABLE_3, PAPER[row.paper_row])) if row.paper_row and columns is TABLE_3 else {}
        lines.append((row.label, cells(row.numbers, columns, near)))
        if row.intervals:
            lines.append(
                (
                    f"  {metrics.LEVEL:.0%} {row.label.removeprefix('this run, ')}",
                    interval_cells(row.intervals, columns),
                )
            )
    return lines


def cells(numbers, columns, near=None):
    """Numbers as text, "-" where there is none; those close to `near` are marked."""
    texts = []
    for key in columns:
        value = numbers.get(key, math.nan)
        mark = "*" if near and abs(value - near[key]) <= CLOSE else ""
        texts.append("-" if math.isnan(value) else f"{value:.3f}{mark}")
    return texts


def interval_cells(intervals, columns):
    found = [intervals.get(key, (math.nan, math.nan)) for key in columns]
    return ["-" if math.isnan(low) else f"{low:.2f}..{high:.2f}" for low, high in found]


def paper_name(layers, epoch):
    return "paper, unmodified" if layers == "base" else f"paper, {layers}, epoch {epoch}"


def phone_tables(records):
    """Each phone with how well it is recognised, and the most frequent confusions of all."""
    report = metrics.phone_report(*heard_and_written(records))
    phones = []
    for entry in report:
        instead = " ".join(f"{written or '-'}:{count}" for written, count in entry["confusions"][:INSTEAD])
        texts = [str(entry["support"]), *cells(entry, ("precision", "recall")), instead]
        phones += [(entry["phone"], texts)] if entry["phone"] else []
    pairs = [
        (entry["phone"] or "nothing", written or "nothing", count, entry["support"])
        for entry in report
        for written, count in entry["confusions"]
    ]
    often = [
        (f"{heard} > {written}", [str(count), f"{count / support:.3f}" if heard != "nothing" else "-"])
        for heard, written, count, support in sorted(pairs, key=lambda pair: -pair[2])[:CONFUSIONS]
    ]
    return [
        ("Phones", ["heard", "precision", "recall", "written instead (-: nothing)"], phones),
        ("Phones heard > written most often", ["times", "share"], often),
    ]


def heard_and_written(records):
    """Phones of all MDD outputs: what raters heard, what the model wrote (nothing where it cannot be parsed)."""
    chosen = [record for record in records if record["task"] == "MDD"]
    parsed = [prompts.parse_output("MDD", record["output"]) for record in chosen]
    written = [metrics.normalise_phones(output["phoneme_transcript"]) if output else [] for output in parsed]
    return [record["reference"]["heard"] for record in chosen], written


def show(table):
    """Print a table."""
    caption, columns, rows = table
    width = max(len(name) for name, _ in [(caption, []), *rows]) + 1
    print("\n" + caption.ljust(width) + "".join(title.rjust(11) + " " for title in columns))
    for name, texts in rows:
        print(name.ljust(width) + "".join(text.rjust(11 + text.endswith("*")).ljust(12) for text in texts))


def explain(rows):
    """What the columns and rows of `result_tables` are, one sentence or two a line."""
    utterances = ", ".join(sorted({f"{row.numbers['utterances']:,}" for row in rows}))
    return [
        f"Measured on {utterances} utterances; others' rows are theirs on the 2,500 of speechocean762's test part.",
        "Scores are PCCs with human scores; the interval is a bootstrap over speakers.",
        "F1, P, R in Table 3: phone agreement by position, a reading that can give the paper's figures. Detection: "
        "found mispronunciations, the field's convention. Two, as the paper defines the second and reports the first.",
        "says everything right: writing what should have been said, without listening.",
        "\u2020: given the sentence. FAR, FRR, DER: false acceptance, false rejection, diagnosis error. cut off: the "
        "length limit came before the end.",
        *(f"*: within {CLOSE} of '{paper_name(*row.paper_row)}' ({row.label})" for row in rows if row.paper_row),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Systems and runs beside each other


class Metrics(files.Shape):
    """metrics.json: what was evaluated, and numbers, null for those that do not exist."""

    model_config = ConfigDict(extra="allow")
    evaluated: str
    utterances: int
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-cli.LARGEST, le=cli.LARGEST)] | None]


def summarise(runs):
    """Print mean, standard deviation and range of each number over the metrics.json of several runs."""
    paths = [run if run.is_file() else run / "metrics.json" for run in runs]
    if repeated := [run for run, path in zip(runs, paths) if [p.resolve() for p in paths].count(path.resolve()) > 1]:
        raise cli.InputError(f"--summarise names {repeated[0]} more than once: a spread is over different runs")
    results = {run: read_metrics(path) for run, path in zip(runs, paths)}
    counted = {run: f"{values['utterances']:,} utterances" for run, values in results.items()}
    if len(set(counted.values())) > 1:
        raise cli.InputError(
            "these runs were evaluated on different utterances: "
            + ", ".join(f"{run} on {count}" for run, count in counted.items())
        )
    if len(runs) < 2:
        raise cli.InputError(f"--summarise {runs[0]} is one run: a spread needs two or more")
    print(
        f"{len(runs)} runs, {counted[runs[0]]} each: "
        + ", ".join(f"{run} ({values['evaluated']})" for run, values in results.items())
    )
    print(f"\n{'':30}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}{'runs':>8}")
    for key in next(iter(results.values())):
        values = [result[key] for result in results.values() if result.get(key) is not None]
        if key not in Metrics.model_fields and not key.endswith(("_low", "_high")) and values:
            spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            print(
                f"{key:30}{statistics.fmean(values):10.3f}{spread:>10}{min(values):10.3f}{max(values):10.3f}{len(values):8}"
            )
    print("\nstd: of the sample (n - 1). runs: those that have the number; a constant prediction has no correlation.")


def read_metrics(path):
    """The numbers of a metrics.json of evaluate.py, by key; None where there is none. Raises InputError."""
    try:
        return files.read_json(path, Metrics).model_dump()
    except cli.InputError as error:
        raise cli.InputError(f"{error}; evaluate the run first") from error


def compare(first, second, names, samples):
    """Table of the differences of two systems. first, second: numbers; samples: their resamples, in the same draws."""
    rows = []
    for key in (*(f"{name}_{kind}" for kind in ("pcc", "mae") for name in prompts.SCORES), *COMPARED):
        difference = samples[0][key] - samples[1][key]
        low, high = metrics.interval(difference)
        if not math.isnan(low):
            texts = [
                f"{first[key]:.3f}",
                f"{second[key]:.3f}",
                f"{first[key] - second[key]:+.3f}",
                f"{low:+.3f}..{high:+.3f}",
                f"{metrics.sign_pvalue(difference):.3f}",
            ]
            rows.append((key, texts))
    return "Difference, by speakers", [*names, "difference", "95 %", "p"], rows
