"""The tables of bench/README.md, made from bench/results/: python bench/readme.py"""

import json
from pathlib import Path
import re
from statistics import median
import sys

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

from support import files

README = BENCH / "README.md"
BASELINE = "Trainer"
NEW = 1 / 6  # share of an example's uses, over three epochs of two tasks, in which its recording is new
STEPS = 3 * 78  # of the paper's run
HOUR = 3600
MODELS = {"scaled": "Scaled model", "full": "Full-size model", "trained": "The demo's model"}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values, digits=2):
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def train_step(result):
    """Seconds of a step in each contestant's runs, and how many times faster than Trainer beside it."""
    peak = result["matrix_peak"]
    mean = {
        name: [NEW * run["steps"][1]["seconds"] + (1 - NEW) * run["steps"][2]["seconds"] for run in runs]
        for name, runs in result["runs"].items()
    }
    rows = []
    for name, runs in result["runs"].items():
        first, new, known = zip(*(run["steps"] for run in runs))
        seconds = [step["seconds"] for step in known]
        ratios = [theirs / ours for theirs, ours in zip(mean[BASELINE], mean[name])]
        share = f"{median(step['work'] / step['seconds'] for step in known) / peak:.0%}" if "work" in known[0] else ""
        rows.append(
            [
                name,
                spread([step["seconds"] for step in new]),
                spread(seconds),
                spread(ratios),
                f"{known[0]['tokens'] / median(seconds):,.0f}",
                f"{known[0]['padding']:.1%}",
                f"{median(run['peak_gb'] for run in runs):.2f}",
                share,
                f"{first[0]['loss']:.5f}, {new[0]['loss']:.5f}, {known[0]['loss']:.5f}",
            ]
        )
    hours = STEPS * median(mean["ours"]) / HOUR
    header = [
        "",
        "new, s",
        "known, s",
        f"times {BASELINE}",
        "tokens/s",
        "padding",
        "peak GB",
        "of matrix peak",
        "losses",
    ]
    skipped = "".join(f"; skipped: {name} ({reason})" for name, reason in result["skipped"].items())
    return f"""{table(header, rows)}

{MODELS[result["model"]]}, {result["corpus"]}, {len(next(iter(result["runs"].values())))} runs, medians (and ranges); \
matrix peak {peak / 1e12:.2f} TFLOP/s measured. Three epochs of 5,000 examples with ours: {hours:.1f} hours at this \
rate{skipped}."""


def evaluate(result):
    """Utterances a second of each way, and how many times faster than the loop."""
    number, rows, ways = result["utterances"], [], result["seconds"]
    both = {
        name: [*map(sum, zip(*(ways[f"{task}, {name}"] for task in ("APA", "MDD"))))]
        for name in ("one at a time", "batched")
    }
    for name, seconds in ways.items():
        slow = ways.get(f"{name[:3]}, one at a time", both["one at a time"])
        rows.append(
            [
                name,
                spread([number / value for value in seconds]),
                spread([theirs / value for theirs, value in zip(slow, seconds)], 1),
                f"{median(seconds) / number * result['all'] / HOUR:.2f}",
            ]
        )
    fastest = ways.get("both tasks, batched", both["batched"])
    times = [a / b for a, b in zip(both["one at a time"], fastest)]
    scores = [a / b for a, b in zip(result["seconds"]["APA, batched"], result["seconds"]["APA, expected scores"])]
    header = ["", "utterances/s", "times one at a time", f"hours for {result['all']:,}"]
    return f"""{table(header, rows)}

{MODELS[result["model"]]}, {result["corpus"]}, {number} utterances, batches of {result["batch"]}. Both tasks: \
batched is {spread(times, 1)} times the loop. APA: expected scores are {spread(scores, 1)} times batched greedy."""


def scaling(result):
    """Seconds and GB by size of the corpus."""
    rows = [
        [
            f"{int(size):,}",
            f"{f['read']:.1f}",
            f"{f['check']:.1f}",
            f"{f['first_step']:.1f}",
            f"{f['started_gb']:.3f}",
            f"{f['held_gb']:.3f}",
            f"{f['peak_gb']:.2f}",
        ]
        for size, f in result["sizes"].items()
    ]
    return table(
        [
            "utterances",
            "reading, s",
            "checking lengths, s",
            "first step, s",
            "held before it, GB",
            "held at the end, GB",
            "peak, GB",
        ],
        rows,
    )


def full_size(result):
    """Seconds and peak memory of each process, and on a GPU the hours that the paper's run would take."""
    rows, hours = [], []
    for case, processes in result["cases"].items():
        for name, figures in processes.items():
            digits = {"seconds": 0, "step": 0, "peak_gb": 1, "peak_own_gb": 1, "loss": 2}
            columns = [f"{figures[key]:.{number}f}" if key in figures else "" for key, number in digits.items()]
            rows.append([case, name, *columns])
            if "cuda" in result["benchmark"] and name == "train.py":
                hours.append(f"{case} {STEPS * figures['step'] / HOUR:.1f}")
    told = f"\n\nHours for three epochs of 5,000 examples at these rates: {', '.join(hours)}." if hours else ""
    return table(["case", "process", "seconds", "of them a step", "peak GB", "without mapped, GB", "loss"], rows) + told


def export(result):
    """What an exported checkpoint answers beside the adapter, and what the export took."""
    rows = [
        [
            f"{way['strategy']}, {way['speech_adapter']}" + ", calm" * way["calm"],
            way["dtype"],
            f"{way['equal']} of {way['answers']}",
            *(f"{way[key]:.2g}" for key in ("expected", "logits", "exact", "adapter", "base")),
            f"{way['seconds']:.0f}",
            f"{way['peak_gb']:.1f} ({way['peak_own_gb']:.1f})",
        ]
        for way in result["ways"]
    ]
    header = ["", "type", "equal answers", "expected scores by", "logits by", "in float32 by"]
    header += ["the adapter's own", "no adapter's", "seconds", "peak GB (without mapped)"]
    return f"{table(header, rows)}\n\n{MODELS[result['model']]}."


def serve(result):
    """Requests a second and seconds until an answer, one at a time and together; what was lost, wrong, or kept."""
    rows, runs = [], result["figures"]
    for at_a_time, found in runs.items():
        seconds = [spread([run[key] for run in found]) for key in ("median", "late")]
        rows.append([f"{at_a_time} at a time", spread([run["rate"] for run in found], 1), *seconds])
    lost, wrong = (sum(run[name] for found in runs.values() for run in found) for name in ("lost", "wrong"))
    service, others = ([f"{mb:,}" for mb in column] for column in zip(*result["memory_mb"]))
    return f"""{table(["", "requests/s", "median, s", "95 % below, s"], rows)}

{MODELS[result["model"]]}, {result["requests"]} requests, {result["hostile"]} of them hostile, {len(runs["1"])} runs: \
{lost} lost, {wrong} wrong. MB of the service before and after each run: {", ".join(service)}; of its other \
processes: {", ".join(others)}. Load average at the end: {result["load"][0]}. Hostile: {", ".join(result["kinds"])}."""


def write_tables():
    """Put a table of every result between its marks in the README."""
    text = README.read_text()
    for describe in (train_step, evaluate, scaling, full_size, export, serve):
        name = describe.__name__
        parts = []
        results = [json.loads(path.read_text()) for path in (BENCH / "results").glob(f"{name}-*.json")]
        for result in sorted(results, key=lambda result: (list(MODELS).index(result["model"]), result.get("batch", 0))):
            versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
            parts.append(f"**{result['device']}** ({versions}):\n\n{describe(result)}")
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        marked = "\n".join([marks[0], "\n\n".join(parts), marks[1]])
        text = re.sub(f"{marks[0]}.*{marks[1]}", lambda _, marked=marked: marked, text, flags=re.DOTALL)
    with files.whole(README) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    write_tables()
