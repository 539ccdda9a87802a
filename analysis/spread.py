"""How much do the numbers of several runs differ, trained with other seeds for example?

    python -m analysis.spread out/seed-*

Prints mean, standard deviation and range of each number in the metrics.json of runs that were evaluated on the same
utterances. Needs no model.
"""

from dataclasses import dataclass
from pathlib import Path
import statistics

from tyro.conf import Positional

from support import cli, predictions, screen


@dataclass
class Settings:
    runs: Positional[tuple[Path, ...]]  # evaluated folders, or their metrics.json


def read_runs(runs):
    """{run: its numbers by key}. Raises InputError where they are not of different runs on the same utterances."""
    if len(runs) < 2:
        raise cli.InputError(f"{' '.join(map(str, runs)) or 'nothing'} is given: a spread needs two runs or more")
    paths = [run if run.is_file() else run / "metrics.json" for run in runs]
    real = [path.resolve() for path in paths]
    if repeated := [run for run, path in zip(runs, real) if real.count(path) > 1]:
        raise cli.InputError(f"{repeated[0]} is named more than once: a spread is over different runs")
    results = {run: predictions.read_metrics(path) for run, path in zip(runs, paths)}
    if len({numbers["utterances"] for numbers in results.values()}) > 1:
        counts = ", ".join(f"{run} on {numbers['utterances']:,}" for run, numbers in results.items())
        raise cli.InputError(f"these runs were evaluated on different utterances: {counts}; evaluate them on the same")
    return results


def spread(results):
    """Rows of the table: (key, texts of mean, standard deviation, least, most, and how many runs have the number)."""
    rows = []
    for key in next(iter(results)):
        values = [numbers[key] for numbers in results if numbers.get(key) is not None]
        if key in predictions.Metrics.model_fields or key.endswith(("_low", "_high")) or not values:
            continue
        deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        others = [f"{number:.3f}" for number in (statistics.fmean(values), min(values), max(values))]
        rows.append((key, [others[0], deviation, *others[1:], str(len(values))]))
    return rows


def main():
    settings = cli.parse(Settings, __doc__)
    results = read_runs(settings.runs)
    named = ", ".join(f"{run} ({numbers['evaluated']})" for run, numbers in results.items())
    screen.say(f"{len(results)} runs, {next(iter(results.values()))['utterances']:,} utterances each: {named}")
    screen.show_table("metrics.json", ["mean", "std", "min", "max", "runs"], spread(list(results.values())))
    print()
    screen.say("std: of the sample (n - 1). runs: those that have the number; a constant has no correlation.")


if __name__ == "__main__":
    cli.run_script("analysis.spread", main)
