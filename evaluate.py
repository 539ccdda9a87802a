"""Generate with a fine-tuned model, score what it wrote, and print the row of the paper's Table 3.

    python evaluate.py --adapter out/                        # the last epoch
    python evaluate.py --adapter out/ --epochs all --base    # every epoch, and the model before fine-tuning
    python evaluate.py --predictions out/predictions.jsonl   # score a saved file, without loading a model
    python evaluate.py --summarise out/seed-*                # mean and spread over runs that were evaluated
    torchrun --nproc-per-node 4 evaluate.py --adapter out/   # on four GPUs; writes the same predictions

Writes predictions.jsonl (raw outputs), metrics.json and figure5.png into --output, by default beside the adapter.
Every number can be computed again from predictions.jsonl.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import data
import metrics
import prompts

# Paper, Table 3 (speechocean762 test set): PCC of the four scores, WER, PER, and F1, precision, recall. The last three
# are defined as detection (4.3), but their values fit phone agreement; see metrics.py.
TABLE_3 = {
    "accuracy_pcc": "accuracy", "fluency_pcc": "fluency", "prosodic_pcc": "prosodic", "total_pcc": "total",
    "wer": "WER", "per": "PER", "phone_agreement_f1": "F1", "phone_agreement_precision": "P",
    "phone_agreement_recall": "R",
}  # fmt: skip
BESIDE = {  # what the paper does not report
    "detection_f1": "det. F1", "detection_precision": "det. P", "detection_recall": "det. R",
    "apa_unparsed": "unparsed", "mdd_unparsed": "(MDD)", "apa_truncated": "cut off", "mdd_truncated": "(MDD)",
}  # fmt: skip
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


def parse_arguments():
    """The command line as a namespace. Raises InputError when a value is wrong or two cannot work together."""
    parser = data.ArgumentParser(
        description=__doc__, usage="python evaluate.py [options]", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--adapter", type=Path, help="run folder of train.py, or one of its epoch-N folders")
    add("--epochs", help="of a run folder: last (default), best (on held-out speakers), all, or a number")
    add(
        "--base",
        action="store_true",
        help="the model before fine-tuning, with its shipped speech adapter and "
        "prompts without control tokens (the paper's epoch 0)",
    )
    add("--predictions", type=Path, help="score this file instead of generating")
    add("--summarise", type=Path, nargs="+", metavar="RUN", help="print mean and spread of these runs' metrics.json")
    add = parser.add_argument_group("on what (default: as in training)").add_argument
    add("--data", help="corpus folder or hub id")
    add("--data-revision", help="of the hub id")
    add("--split", default="test", help="of the corpus (default: test)")
    add("--limit", type=int, help="use only the first N utterances")
    add = parser.add_argument_group("how").add_argument
    add("--model", help="checkpoint folder or hub id of the base model (default: as in training)")
    add("--revision", help="of the hub id")
    add("--dtype", choices=("float32", "bfloat16"), help="of frozen weights (default: as in training)")
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), help="(default: as in training)")
    add("--batch-size", type=int, default=16, help="utterances generated together (default: 16)")
    add(
        "--max-new-tokens",
        type=int,
        default=data.MAX_NEW_TOKENS,
        help=f"an answer longer than this is cut off and counted (default: {data.MAX_NEW_TOKENS})",
    )
    add("--output", type=Path, help="folder for predictions.jsonl, metrics.json, figure5.png")

    args = parser.parse_args()
    if not (args.predictions or args.adapter or args.base or args.summarise):
        parser.error("nothing to evaluate: give --adapter, --base, --predictions or --summarise")
    for name, used, what in (
        ("predictions", ("output",), "scores a saved file"),
        ("summarise", (), "reads metrics.json"),
    ):
        idle = [other for other, value in vars(args).items()
                if other not in (name, *used) and value != parser.get_default(other)]  # fmt: skip
        if getattr(args, name) and idle:
            parser.error(f"--{name} {what}: leave out --{' --'.join(idle).replace('_', '-')}")
    if args.epochs and not args.adapter:
        parser.error(f"--epochs {args.epochs} chooses among those of a run: give --adapter as well")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not a number from 1 up")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def adapter_folders(run, epochs):
    """The adapters that `--adapter` and `--epochs` name, as (folder, settings), earliest epoch first."""
    if (run / "adapter_config.json").is_file() or (run / "trained.safetensors").is_file():
        if epochs:
            raise data.InputError(f"{run} is one epoch: leave out --epochs {epochs}, or give the folder above")
        folders = [run]
    else:
        found = [file.parent for file in run.glob("epoch-*/settings.json")]
        found = sorted((f for f in found if re.fullmatch(r"epoch-\d+", f.name)), key=lambda f: int(f.name[6:]))
        if not found:
            raise data.InputError(f"{run} holds no adapter (no epoch-*/settings.json): give train.py's --output")
        if epochs == "best":
            epochs = best_epoch(run)
        chosen = {None: found[-1:], "last": found[-1:], "all": found}
        folders = chosen.get(epochs, [folder for folder in found if folder.name == f"epoch-{epochs}"])
        if not folders:
            raise data.InputError(f"{run} has no epoch {epochs!r}: there are {', '.join(f.name for f in found)}")
    return [(folder, _read_settings(folder / "settings.json")) for folder in folders]


def best_epoch(run):
    """The epoch that train.py marked as the best one on held-out speakers, as text."""
    path = run / "validation.jsonl"
    try:
        return next(str(line["epoch"]) for line in map(json.loads, path.read_text().splitlines()) if line["best"])
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise data.InputError(f"--epochs best: {path} is missing or marks no epoch; it is written by train.py "
                              f"--validation 0.1") from error  # fmt: skip


def _read_settings(path):
    try:
        settings = json.loads(path.read_text())
        missing = {"epoch", "strategy", "speech_adapter", "model", "data"} - settings.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise data.InputError(f"{path}, which train.py writes beside an adapter, cannot be read: {error}") from error
    if missing:
        raise data.InputError(f"{path} lacks {', '.join(sorted(missing))}: it is not train.py's")
    return settings


@dataclass
class Evaluation:
    """One row of the table: what writes the predictions, and where they go."""

    label: str  # "base" or "epoch-N"; "predictions" for a saved file
    output: Path
    adapter: Path | None = None  # None: the unmodified model
    settings: dict = field(default_factory=dict)  # of the adapter's training; empty without one

    @property
    def paper_row(self):
        """Key of PAPER for the same strategy ("lora" for "full") and epoch, or the best one (3) for others."""
        if self.label == "base":
            return "base", 0
        strategy = self.settings.get("strategy")
        strategy = strategy if (strategy, 3) in PAPER else "lora"
        return next(key for key in ((strategy, self.settings.get("epoch")), (strategy, 3)) if key in PAPER)


def evaluations(args):
    """What the arguments ask for, the unmodified model first."""
    if args.predictions:
        return [Evaluation("predictions", args.output or args.predictions.parent)]
    adapters = adapter_folders(args.adapter, args.epochs) if args.adapter else []
    output = args.output or args.adapter or Path("out/base")
    chosen = []
    if args.base:
        settings = adapters[-1][1] if adapters else {}
        chosen.append(Evaluation("base", output / "base" if adapters else output, None, settings))
    for folder, settings in adapters:
        own = output / folder.name if len(adapters) > 1 else output
        chosen.append(Evaluation(f"epoch-{settings['epoch']}", own, folder, settings))
    return chosen


def read_test_data(settings, args):
    """The utterances to evaluate on: of the corpus that the adapter was trained on, if no other is named."""
    source = args.data or settings.get("data", data.HUB_CORPUS)
    revision = args.data_revision or settings.get("data_revision", data.HUB_CORPUS_REVISION)
    utterances = data.read_corpus(source, args.split, revision, args.limit)
    print(f"corpus: {source} ({args.split}), {data.describe(utterances)}")
    return utterances


def generate(evaluation, utterances, args):
    """Write predictions.jsonl: the answers of one adapter, or of the unmodified model, for both tasks.

    Under torchrun each process takes every n-th batch, and rank 0 writes them in the corpus' order.
    """
    import model as models
    import runtime

    settings, base = evaluation.settings, evaluation.adapter is None
    name = args.model or settings.get("model", models.HUB_MODEL)
    model = models.load_base(
        name,
        args.revision or settings.get("revision", models.HUB_MODEL_REVISION),
        args.dtype or settings.get("dtype", models.default_dtype()),
        args.attention or settings.get("attention", "sdpa"),
        "merge" if base else settings["speech_adapter"],  # the unmodified model hears through its speech adapter
        settings.get("quantize"),
    )
    if not base:
        models.load_trained(model, evaluation.adapter, settings["strategy"])
    model.eval()
    print(f"model: {name}, " + ("unmodified, prompts without control tokens" if base else f"{evaluation.adapter}"))

    batches = [utterances[i : i + args.batch_size] for i in range(0, len(utterances), args.batch_size)]
    rank, processes = runtime.rank(), runtime.processes()
    with (runtime.whole(evaluation.output / "predictions.jsonl") as path, open(path, "w", encoding="utf-8") as file,
          tqdm(total=2 * len(utterances), unit="output", disable=rank > 0) as bar):  # fmt: skip
        for start in range(0, len(batches), processes):
            own = batches[start + rank] if start + rank < len(batches) else []
            for lines in runtime.gather(list(answers(model, own, args.max_new_tokens, control_token=not base))):
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                bar.update(len(lines))


def answers(model, batch, max_new_tokens, control_token):
    """The lines of predictions.jsonl for some utterances, APA first."""
    import model as models

    for task in prompts.TASKS if batch else ():
        with models.autocast():
            outputs = model.generate(batch, task, max_new_tokens, control_token)
        for utterance, (text, tokens, truncated) in zip(batch, outputs, strict=True):
            yield {"id": utterance.id, "task": task, "output": text, "reference": data.reference(utterance, task),
                   "tokens": tokens, "truncated": truncated}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def read_predictions(path):
    """The lines of a predictions file. Raises InputError naming the first line that is not one."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                records.append(_check_prediction(json.loads(line)))
    except OSError as error:
        raise data.InputError(f"predictions {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise data.InputError(f"line {number} of {path} is not a prediction of evaluate.py: {error!r}") from error
    if not records:
        raise data.InputError(f"predictions {path} is empty")
    return records


def _check_prediction(record):
    kinds = {"APA": dict.fromkeys(prompts.SCORES, (int, float)),
             "MDD": {"word_transcript": str, "canonical": list, "heard": list}}[record["task"]]  # fmt: skip
    values = [(record["id"], str), (record["output"], str)]
    for value, kind in values + [(record["reference"][key], kind) for key, kind in kinds.items()]:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} has the wrong type")
    return record


def score(records):
    """Numbers, and the reasons of missing ones; metrics.summarise plus shares of cut-off outputs and `utterances`."""
    by_task = {task: [record for record in records if record["task"] == task] for task in prompts.TASKS}
    pairs = {
        task: [(prompts.parse_output(task, record["output"]), record["reference"]) for record in chosen]
        for task, chosen in by_task.items()
    }
    numbers, reasons = metrics.summarise(pairs["APA"], pairs["MDD"])
    for task, chosen in by_task.items():
        cut = [record["truncated"] for record in chosen if "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = sum(cut) / len(cut) if cut else math.nan
    numbers["utterances"] = len({record["id"] for record in records})
    return numbers, reasons


def canonical_floor(records):
    """Numbers of a "model" that writes what should have been said: the PER and F1 that need no listening."""
    references = [record["reference"] for record in records if record["task"] == "MDD"]
    outputs = [
        {"word_transcript": r["word_transcript"], "phoneme_transcript": " ".join(r["canonical"])} for r in references
    ]
    return metrics.summarise([], list(zip(outputs, references)))[0]


def write_metrics(numbers, evaluation):
    """metrics.json with flat keys; a number that does not exist is null, as JSON has no nan."""
    output = evaluation.output
    values = {"evaluated": evaluation.label} | {k: None if math.isnan(v) else v for k, v in numbers.items()}
    temporary = output / "metrics.json.tmp"
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, output / "metrics.json")


def draw_figure5(records, path):
    """The paper's Figure 5: PER of each utterance against its human and its predicted accuracy, with PCC."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {"human": ([], []), "predicted": ([], [])}
    apa = {record["id"]: record for record in records if record["task"] == "APA"}
    for record in records:
        if record["task"] != "MDD" or record["id"] not in apa or not record["reference"]["heard"]:
            continue
        output = prompts.parse_output("MDD", record["output"])
        phones = metrics.normalise_phones(output["phoneme_transcript"]) if output else []
        per = metrics.error_rate([record["reference"]["heard"]], [phones])
        scores = apa[record["id"]]
        predicted = prompts.parse_output("APA", scores["output"])
        for name, values in (("human", scores["reference"]), ("predicted", predicted)):
            if values:
                points[name][0].append(values["accuracy"])
                points[name][1].append(per)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (name, (scores, pers)) in zip(axes, points.items()):
        pcc, pvalue, _, reason = metrics.correlation(scores, pers)
        axis.scatter(scores, pers, s=12, alpha=0.35, linewidths=0)
        axis.set(xlabel=f"{name} accuracy score", xlim=(-0.5, 10.5))
        axis.set_title(f"PCC {pcc:.3f} (p = {pvalue:.1g}; paper {PAPER_FIGURE_5[name]:.3f})" if reason is None
                       else f"no PCC: {reason}")  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PER of the utterance")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def print_table(rows, floor):
    """Print Table 3 with the paper's rows, then what the paper does not report. rows: list of (Evaluation, numbers)."""
    print_row("\nTable 3", {}, TABLE_3, header=True)
    strategies = {evaluation.paper_row[0] for evaluation, _ in rows} - {"base"} or {"lora"}
    for layers, epoch in PAPER:
        if layers in strategies or layers == "base":
            print_row(paper_name(layers, epoch), dict(zip(TABLE_3, PAPER[layers, epoch])), TABLE_3)
    print_row("canonical phones", floor, TABLE_3)
    for evaluation, numbers in rows:
        near = dict(zip(TABLE_3, PAPER[evaluation.paper_row]))
        print_row(f"this run, {evaluation.label}", numbers, TABLE_3, near)
    utterances = ", ".join(sorted({f"{numbers['utterances']:,}" for _, numbers in rows}))
    print(f"""
Measured on {utterances} utterances; the paper's rows are its results on the 2,500 of speechocean762's test part.
Scores: PCC with human scores. F1, P, R: phone agreement by position, a reading that can give the paper's figures.
canonical phones: writing what should have been said, without listening.""")
    for evaluation, _ in rows:
        print(f"* within {CLOSE} of the paper: {evaluation.label} against '{paper_name(*evaluation.paper_row)}'")

    print_row("\nNot in the paper", {}, BESIDE, header=True)
    print_row("canonical phones", {key: floor[key] for key in BESIDE if key.startswith("detection")}, BESIDE)
    for evaluation, numbers in rows:
        print_row(f"this run, {evaluation.label}", numbers, BESIDE)
    print("""
det.: mispronunciation detection, the field's convention. unparsed, cut off: share of outputs (APA, MDD) that could
not be parsed, or hit the length limit.
""")
    for evaluation, numbers in rows:
        for name in prompts.SCORES:
            if not math.isnan(numbers[f"{name}_pcc"]):
                print(f"{evaluation.label}, {name}: p-value of the PCC {numbers[f'{name}_pvalue']:.1e}, "
                      f"mean absolute error {numbers[f'{name}_mae']:.2f} points of 10")  # fmt: skip


def paper_name(layers, epoch):
    return "paper, unmodified" if layers == "base" else f"paper, {layers}, epoch {epoch}"


def print_row(name, numbers, columns, near=None, header=False):
    cells = []
    for key, title in columns.items():
        value = numbers.get(key, math.nan)
        mark = "*" if near and abs(value - near[key]) <= CLOSE else " "
        cells.append(f"{title} " if header else f"{'-' if math.isnan(value) else f'{value:.3f}'}{mark}")
    print(f"{name:23}" + "".join(cell.rjust(10) for cell in cells))


def summarise(runs):
    """Print mean, standard deviation and range of each number over the metrics.json of several runs."""
    results = {run: _read_metrics(run if run.is_file() else run / "metrics.json") for run in runs}
    counted = {run: f"{values['utterances']:,} utterances" for run, values in results.items()}
    if len(set(counted.values())) > 1:
        raise data.InputError("these runs were evaluated on different utterances: "
                              + ", ".join(f"{run} on {count}" for run, count in counted.items()))  # fmt: skip
    if len(runs) < 2:
        raise data.InputError(f"--summarise {runs[0]} is one run: a spread needs two or more")
    print(f"{len(runs)} runs, {counted[runs[0]]} each: "
          + ", ".join(f"{run} ({values['evaluated']})" for run, values in results.items()))  # fmt: skip
    print(f"\n{'':30}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}{'runs':>8}")
    for key in next(iter(results.values())):
        values = [result[key] for result in results.values() if isinstance(result.get(key), (int, float))]
        if key != "utterances" and values:
            spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
            print(
                f"{key:30}{statistics.fmean(values):10.3f}{spread:>10}{min(values):10.3f}{max(values):10.3f}{len(values):8}"
            )
    print("\nstd: of the sample (n - 1). runs: those that have the number; a constant prediction has no correlation.")


def _read_metrics(path):
    try:
        values = json.loads(path.read_text())
        values["evaluated"], values["utterances"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.InputError(f"{path} cannot be read, or is not evaluate.py's: evaluate the run first") from error
    return values


def main():
    """Generate where asked, score, write the files and print the table."""
    args = parse_arguments()
    if args.summarise:
        return summarise(args.summarise)
    chosen = evaluations(args)
    utterances, rank = None, 0
    if not args.predictions:
        import model as models
        import runtime

        runtime.start_processes()
        rank = runtime.rank()
        models.check_model(args.model or chosen[-1].settings.get("model", models.HUB_MODEL))
        utterances = read_test_data(chosen[-1].settings, args)
    rows = []
    for evaluation in chosen:
        if utterances:
            gc.collect()  # the previous model leaves the GPU before the next one comes
            generate(evaluation, utterances, args)
        if rank == 0:
            records = read_predictions(args.predictions or evaluation.output / "predictions.jsonl")
            rows.append((evaluation, score_and_draw(records, evaluation)))
    if rank == 0:
        print_table(rows, canonical_floor(records))
        written = "" if args.predictions else "predictions.jsonl, "
        print(f"\nwritten: {written}metrics.json, figure5.png in {', '.join(str(e.output) for e in chosen)}")
    if utterances:
        runtime.end_processes()


def score_and_draw(records, evaluation):
    """Write metrics.json and figure5.png of one row; returns its numbers."""
    numbers, reasons = score(records)
    evaluation.output.mkdir(parents=True, exist_ok=True)
    write_metrics(numbers, evaluation)
    draw_figure5(records, evaluation.output / "figure5.png")
    for key, reason in reasons.items():
        print(f"{evaluation.label}: no {key}: {reason}")
    return numbers


if __name__ == "__main__":
    data.run_script("evaluate.py", main)
