"""Generate with a fine-tuned model, score what it wrote, and print the row of the paper's Table 3.

    python evaluate.py --adapter out/                        # the last epoch
    python evaluate.py --adapter out/ --epochs all --base    # every epoch, and the model before fine-tuning
    python evaluate.py --predictions out/predictions.jsonl   # score a saved file, without loading a model

Writes predictions.jsonl (raw outputs), metrics.json and figure5.png into --output, by default beside the adapter.
Every number can be computed again from predictions.jsonl.
"""

import argparse
import json
import math
import os
import sys
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
CLOSE = 0.05  # a number this near to the paper's is marked

def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, usage="python evaluate.py [options]", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--adapter", type=Path, help="run folder of train.py, or one of its epoch-N folders")
    add("--epochs", default="last", help="of a run folder: last (default), all, or a number")
    add("--base", action="store_true", help="the model before fine-tuning, with its shipped speech adapter and "
        "prompts without control tokens (the paper's epoch 0)")
    add("--predictions", type=Path, help="score this file instead of generating")
    add = parser.add_argument_group("on what (default: as in training)").add_argument
    add("--data", help="corpus folder or hub id")
    add("--data-revision", help="of the hub id")
    add("--split", default="test", help="of the corpus (default: test)")
    add("--limit", type=int, help="use only the first N utterances")
    add = parser.add_argument_group("how").add_argument
    add("--model", help="checkpoint folder or hub id of the base model (default: as in training)")
    add("--revision", help="of the hub id")
    add("--batch-size", type=int, default=16, help="utterances generated together (default: 16)")
    add("--max-new-tokens", type=int, default=400, help="an answer longer than this is cut off and counted "
        "(default: 400; the corpus' longest has 46 phones)")
    add("--output", type=Path, help="folder for predictions.jsonl, metrics.json, figure5.png")

    args = parser.parse_args()
    if args.predictions and (args.adapter or args.base):
        parser.error("--predictions scores a saved file: leave out --adapter and --base")
    if not (args.predictions or args.adapter or args.base):
        parser.error("nothing to evaluate: give --adapter, --base or --predictions")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not a number from 1 up")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def adapter_folders(run, epochs):
    """The adapters that `--adapter` and `--epochs` name, as (folder, settings), earliest epoch first."""
    if (run / "adapter_config.json").is_file():
        folders = [run]
    else:
        found = sorted(run.glob("epoch-*/adapter_config.json"), key=lambda file: int(file.parent.name[6:]))
        folders = [file.parent for file in found]
        if not folders:
            raise data.InputError(f"{run} holds no adapter (no epoch-*/adapter_config.json): give train.py's --output")
        if epochs == "last":
            folders = folders[-1:]
        elif epochs != "all":
            folders = [folder for folder in folders if folder.name == f"epoch-{epochs}"]
            if not folders:
                raise data.InputError(f"{run} has no epoch {epochs!r}: there are {', '.join(f.parent.name for f in found)}")
    try:
        return [(folder, json.loads((folder / "settings.json").read_text())) for folder in folders]
    except (OSError, ValueError) as error:
        raise data.InputError(f"settings.json of an adapter in {run} cannot be read: {error}") from error


def evaluations(args):
    """What to generate: (label, adapter folder or None, settings, output folder), the unmodified model first."""
    adapters = adapter_folders(args.adapter, args.epochs) if args.adapter else []
    output = args.output or args.adapter or Path("out/base")
    chosen = {}
    if args.base:
        settings = adapters[-1][1] if adapters else {}
        chosen["base"] = (None, settings, output / "base" if adapters else output)
    for folder, settings in adapters:
        several = len(adapters) > 1
        chosen[f"epoch-{settings['epoch']}"] = (folder, settings, output / folder.name if several else output)
    return [(label, *rest) for label, rest in chosen.items()]


def generate(folder, settings, output, args):
    """Write predictions.jsonl for one adapter, or for the unmodified model where `folder` is None."""
    import model as models

    name = args.model or settings.get("model", models.HUB_MODEL)
    revision = args.revision or settings.get("revision", models.HUB_MODEL_REVISION)
    source = args.data or settings.get("data", data.HUB_CORPUS)
    models.check_hardware(name)
    utterances = data.read_corpus(
        source, args.split, args.data_revision or settings.get("data_revision", data.HUB_CORPUS_REVISION), args.limit
    )
    print(f"corpus: {data.describe(utterances)}")
    base = folder is None
    merge = base or settings["speech_adapter"] == "merge"
    model = models.load_base(
        name, revision, settings.get("dtype", models.default_dtype()), settings.get("attention", "sdpa"), merge
    )
    if not base:
        models.load_adapter(model, folder)
    model.eval()
    print(f"model: {name}, {'unmodified, prompts without control tokens' if base else f'adapter {folder}'}")

    output.mkdir(parents=True, exist_ok=True)
    temporary = output / "predictions.jsonl.tmp"
    with open(temporary, "w", encoding="utf-8") as file, tqdm(total=2 * len(utterances), unit="output") as bar:
        for start in range(0, len(utterances), args.batch_size):
            batch = utterances[start : start + args.batch_size]
            for task in prompts.TASKS:
                with models.autocast(model.device):
                    answers = model.generate(batch, task, args.max_new_tokens, control_token=not base)
                for utterance, (text, tokens, truncated) in zip(batch, answers, strict=True):
                    line = {"id": utterance.id, "task": task, "output": text, "reference": reference(utterance, task),
                            "tokens": tokens, "truncated": truncated}  # fmt: skip
                    print(json.dumps(line, ensure_ascii=False), file=file)
                bar.update(len(batch))
    os.replace(temporary, output / "predictions.jsonl")


def reference(utterance, task):
    """What a prediction is scored against."""
    if task == "APA":
        return utterance.scores
    return {"word_transcript": utterance.text, "canonical": utterance.canonical, "heard": utterance.heard}


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def read_predictions(path):
    """The lines of a predictions file. Raises InputError naming the first line that is not one."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                needed = prompts.SCORES if record["task"] == "APA" else ("word_transcript", "canonical", "heard")
                if record["task"] not in prompts.TASKS or not record["reference"].keys() >= set(needed):
                    raise KeyError("task or reference")
                record["output"].strip()
                records.append(record)
    except OSError as error:
        raise data.InputError(f"predictions {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.InputError(f"line {number} of {path} is not a prediction of evaluate.py: {error!r}") from error
    if not records:
        raise data.InputError(f"predictions {path} is empty")
    return records


def score(records):
    """Numbers and the reasons of missing ones; see metrics.summarise. Adds the share of cut-off outputs."""
    by_task = {task: [record for record in records if record["task"] == task] for task in prompts.TASKS}
    pairs = {
        task: [(prompts.parse_output(task, record["output"]), record["reference"]) for record in chosen]
        for task, chosen in by_task.items()
    }
    numbers, reasons = metrics.summarise(pairs["APA"], pairs["MDD"])
    for task, chosen in by_task.items():
        cut = [record["truncated"] for record in chosen if "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = sum(cut) / len(cut) if cut else math.nan
    return numbers, reasons


def canonical_floor(records):
    """Numbers of a "model" that writes what should have been said: the PER and F1 that need no listening."""
    references = [record["reference"] for record in records if record["task"] == "MDD"]
    outputs = [
        {"word_transcript": r["word_transcript"], "phoneme_transcript": " ".join(r["canonical"])} for r in references
    ]
    return metrics.summarise([], list(zip(outputs, references)))[0]


def write_metrics(numbers, output, label):
    """metrics.json with flat keys; a number that does not exist is null, as JSON has no nan."""
    values = {"evaluated": label} | {k: None if math.isnan(v) else v for k, v in numbers.items()}
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
        for name, values in (("human", scores["reference"]), ("predicted", prompts.parse_output("APA", scores["output"]))):
            if values:
                points[name][0].append(values["accuracy"])
                points[name][1].append(per)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (name, (scores, pers)) in zip(axes, points.items()):
        pcc, pvalue, _, reason = metrics.correlation(scores, pers)
        axis.scatter(scores, pers, s=12, alpha=0.35, linewidths=0)
        axis.set(xlabel=f"{name} accuracy score", xlim=(-0.5, 10.5))
        axis.set_title(f"PCC {pcc:.3f} (p = {pvalue:.1g})" if reason is None else f"no PCC: {reason}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PER of the utterance")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def paper_row(label, strategy):
    """The paper's row for the same epoch, or its best (3) where it has none."""
    if label == "base":
        return "base", 0
    epoch = int(label[6:]) if label.startswith("epoch-") else 3
    return (strategy, epoch) if (strategy, epoch) in PAPER else (strategy, 3)


def print_table(rows, floor, strategy):
    """rows: {label: numbers}. Prints Table 3 with the paper's rows, then what the paper does not report."""
    print_row("\nTable 3", {}, TABLE_3, header=True)
    for layers, epoch in PAPER:
        if layers in ("base", strategy):
            name = "paper, unmodified" if layers == "base" else f"paper, {layers}, epoch {epoch}"
            print_row(name, dict(zip(TABLE_3, PAPER[layers, epoch])), TABLE_3)
    print_row("canonical phones", floor, TABLE_3)
    for label, numbers in rows.items():
        near = dict(zip(TABLE_3, PAPER[paper_row(label, strategy)]))
        print_row(f"this run, {label}", numbers, TABLE_3, near)
    print(f"""
Scores: PCC with human scores. F1, P, R: phone agreement by position, which the paper's figures fit.
"canonical phones" writes what should have been said, without listening.
* within {CLOSE} of the paper's row of that epoch (of epoch 3 where the paper has none). The paper's rows are its
results on speechocean762.""")

    print_row("\nNot in the paper", {}, BESIDE, header=True)
    print_row("canonical phones", {key: floor[key] for key in BESIDE if key.startswith("detection")}, BESIDE)
    for label, numbers in rows.items():
        print_row(f"this run, {label}", numbers, BESIDE)
    print("""
det.: mispronunciation detection, the field's convention. unparsed, cut off: share of outputs (APA, MDD) that could
not be parsed, or hit the length limit.""")
    for label, numbers in rows.items():
        print(f"\n{label}:")
        for name in prompts.SCORES:
            if not math.isnan(numbers[f"{name}_pcc"]):
                print(f"  {name:9} p-value of PCC {numbers[f'{name}_pvalue']:.1e}, "
                      f"mean absolute error {numbers[f'{name}_mae']:.2f} points of 10")  # fmt: skip


def print_row(name, numbers, columns, near=None, header=False):
    cells = []
    for key, title in columns.items():
        value = numbers.get(key, math.nan)
        mark = "*" if near and abs(value - near[key]) <= CLOSE else " "
        cells.append(f"{title} " if header else f"{'-' if math.isnan(value) else f'{value:.3f}'}{mark}")
    print(f"{name:23}" + "".join(cell.rjust(10) for cell in cells))


def main():
    args = parse_arguments()
    rows, strategy = {}, "lora"
    if args.predictions:
        jobs = [("predictions", None, {}, args.output or args.predictions.parent)]
    else:
        jobs = evaluations(args)
    for label, folder, settings, output in jobs:
        if args.predictions:
            records = read_predictions(args.predictions)
            output.mkdir(parents=True, exist_ok=True)
        else:
            generate(folder, settings, output, args)
            records = read_predictions(output / "predictions.jsonl")
        strategy = settings.get("strategy", strategy)
        rows[label], reasons = score(records)
        write_metrics(rows[label], output, label)
        draw_figure5(records, output / "figure5.png")
        for key, reason in reasons.items():
            print(f"{label}: no {key}: {reason}")
    print_table(rows, canonical_floor(records), strategy)
    print(f"\nwritten: predictions.jsonl, metrics.json, figure5.png in {', '.join(str(job[3]) for job in jobs)}")


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
