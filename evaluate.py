"""Generate with a fine-tuned model, score what it wrote, and print the row of the paper's Table 3.

    python evaluate.py --adapter out/                        # the last epoch
    python evaluate.py --adapter out/ --epochs all --base    # every epoch, and the model before fine-tuning
    python evaluate.py --predictions out/predictions.jsonl   # score a saved file, without loading a model
    python evaluate.py --summarise out/seed-*                # mean and spread over runs that were evaluated
    python evaluate.py --compare a/predictions.jsonl b/predictions.jsonl   # is one better, or is it chance?
    python evaluate.py --adapter out/ --audio my.wav --text "WE CALL IT BEAR"   # your own recording
    torchrun --nproc-per-node 4 evaluate.py --adapter out/   # on four GPUs; writes the same predictions

Writes predictions.jsonl (raw outputs), metrics.json and figure5.png into --output, by default beside the adapter, and
with --report a page to look at and listen to.
Every number can be computed again from predictions.jsonl.
"""

import argparse
import gc
import json
import math
import os
import re
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field
from tqdm import tqdm

import data
import metrics
import prompts
import report
import tables
from support import cli, files

WINDOW = 8  # batches that are sorted by length together; outputs are written after each window
SCORINGS = ("greedy", "expected")  # the paper's, and the expectation of each score's distribution
SCORED = ("metrics.json", "figure5.png", "phones.tsv")  # what scoring writes
GENERATED = ("predictions.jsonl", "predictions.jsonl.part", "predictions.settings.json")  # what generating writes

# ----------------------------------------------------------------------------------------------------------------------
# The files that are read


def _one_phone(text):
    if text.split() != [text]:
        raise ValueError("a phone is one or more characters without spaces")
    return text


def _distribution(probabilities):
    if abs(sum(probabilities) - 1) > 1e-3:
        raise ValueError(f"probabilities sum to {sum(probabilities):.4g}, not 1")
    return probabilities


Value = TypeVar("Value")
Phones = list[Annotated[str, AfterValidator(_one_phone)]]
Score = Annotated[float, Field(ge=prompts.SCORE_RANGE[0], le=prompts.SCORE_RANGE[1])]
Probability = Annotated[float, Field(ge=0)]
Distribution = Annotated[list[Probability], Field(min_length=11, max_length=11), AfterValidator(_distribution)]


class ByScore(files.Shape, Generic[Value]):
    """A value for each of prompts.SCORES."""

    accuracy: Value
    fluency: Value
    prosodic: Value
    total: Value


class Transcripts(files.Shape):
    """What should have been said, and the phones that raters heard."""

    word_transcript: str
    canonical: Phones
    heard: Phones


class Prediction(files.Shape):
    """A line of predictions.jsonl: the raw answer to one utterance in one task."""

    id: str
    output: str
    speaker: str | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    truncated: bool | None = None


class AssessmentLine(Prediction):
    task: Literal["APA"]
    reference: ByScore[Score]
    scores: ByScore[Distribution] | None = None


class DiagnosisLine(Prediction):
    task: Literal["MDD"]
    reference: Transcripts


Line = Annotated[AssessmentLine | DiagnosisLine, Field(discriminator="task")]


class TrainingSettings(files.Shape):
    """settings.json, which train.py writes beside an adapter; the choices are those of its command line."""

    epoch: Annotated[int, Field(ge=1, le=cli.LARGEST)]
    strategy: Literal["lora", "unfreeze", "full"]
    speech_adapter: Literal["merge", "continue", "none"]
    model: str
    data: str
    revision: str | None = None
    data_revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    quantize: Literal["nf4"] | None = None


class ValidatedEpoch(files.Shape):
    """A line of validation.jsonl, which train.py --validation writes."""

    epoch: int
    best: bool


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def parse_arguments():
    """The command line as a namespace. Raises InputError when a value is wrong or two cannot work together."""
    parser = cli.ArgumentParser(
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
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="differences of two predictions files, with p-values")
    add("--audio", type=Path, nargs="+", metavar="FILE", help="assess these recordings instead of a corpus")
    add("--text", help="what should be said in --audio: its words are marked phone by phone")
    add("--json", action="store_true", help="print what --audio gives as JSON")
    add = parser.add_argument_group("on what (default: as in training)").add_argument
    add("--data", help="corpus folder or hub id")
    add("--data-revision", help="of the hub id")
    add("--split", default="test", help="of the corpus (default: test)")
    add("--limit", type=cli.positive_int, help="use only the first N utterances")
    add = parser.add_argument_group("how").add_argument
    add("--model", help="checkpoint folder or hub id of the base model (default: as in training)")
    add("--revision", help="of the hub id")
    add("--dtype", choices=("float32", "bfloat16"), help="of frozen weights (default: as in training)")
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), help="(default: as in training)")
    add("--batch-size", type=cli.positive_int, default=16, help="utterances generated together (default: 16)")
    add(
        "--max-new-tokens",
        type=cli.positive_int,
        default=data.MAX_NEW_TOKENS,
        help=f"an answer longer than this is cut off and counted (default: {data.MAX_NEW_TOKENS})",
    )
    add(
        "--scoring",
        nargs="+",
        choices=SCORINGS,
        default=["greedy"],
        help="of APA: the written answer (default, the "
        "paper's), or the expectation of each score's distribution, or both",
    )
    add("--audio-ablation", choices=("silence", "swap"), help="evaluate on other audio as well, and print the drop")
    add("--resume", action="store_true", help="go on with outputs that were written before a stop")
    add("--output", type=Path, help="folder for predictions.jsonl, metrics.json, figure5.png")
    add("--report", type=Path, help="write a page with tables, plots and recordings to this .html file")

    args = parser.parse_args()
    if not (args.predictions or args.adapter or args.base or args.summarise or args.compare):
        parser.error("nothing to evaluate: give --adapter, --base, --predictions, --summarise or --compare")
    how = ("adapter", "base", "epochs", "model", "revision", "dtype", "attention", "max_new_tokens")
    for name, used, what in (
        ("predictions", ("output", "report", "data", "data_revision", "split"), "scores a saved file"),
        ("summarise", (), "reads metrics.json"),
        ("compare", (), "reads two predictions files"),
        ("audio", ("text", "json", *how), "assesses recordings, not a corpus"),
    ):
        idle = [
            other
            for other, value in vars(args).items()
            if other not in (name, *used) and value != parser.get_default(other)
        ]
        if getattr(args, name) and idle:
            parser.error(f"--{name} {what}: leave out --{' --'.join(idle).replace('_', '-')}")
    for name in ("text", "json"):
        if getattr(args, name) and not args.audio:
            parser.error(f"--{name} is for recordings: give --audio as well")
    if args.epochs and not args.adapter:
        parser.error(f"--epochs {args.epochs} chooses among those of a run: give --adapter as well")
    if args.audio and (args.epochs == "all" or (args.adapter and args.base)):
        parser.error("--audio takes one model: leave out --epochs all, and give --adapter or --base")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def adapter_folders(run, epochs):
    """The adapters that `--adapter` and `--epochs` name, as (folder, settings), earliest epoch first."""
    if any(map(os.path.isfile, (run / "adapter_config.json", run / "trained.safetensors"))):
        if epochs:
            raise cli.InputError(f"{run} is one epoch: leave out --epochs {epochs}, or give the folder above")
        folders = [run]
    else:
        found = [file.parent for file in run.glob("epoch-*/settings.json")]
        found = sorted((f for f in found if re.fullmatch(r"epoch-\d+", f.name)), key=lambda f: int(f.name[6:]))
        if not found:
            raise cli.InputError(f"{run} holds no adapter (no epoch-*/settings.json): give train.py's --output")
        if epochs == "best":
            epochs = best_epoch(run)
        chosen = {None: found[-1:], "last": found[-1:], "all": found}
        folders = chosen.get(epochs, [folder for folder in found if folder.name == f"epoch-{epochs}"])
        if not folders:
            raise cli.InputError(f"{run} has no epoch {epochs!r}: there are {', '.join(f.name for f in found)}")
    settings = [files.read_json(folder / "settings.json", TrainingSettings) for folder in folders]
    return [(folder, found.model_dump(exclude_none=True)) for folder, found in zip(folders, settings)]


def best_epoch(run):
    """The epoch that train.py marked as the best one on held-out speakers, as text."""
    path = run / "validation.jsonl"
    lines = files.read_lines(path, ValidatedEpoch) if path.exists() else []
    best = [str(line.epoch) for line in lines if line.best]
    if len(best) != 1:
        raise cli.InputError(
            f"--epochs best: {path} is missing or marks {len(best)} epochs; it is written by train.py --validation 0.1"
        )
    return best[0]


@dataclass
class Evaluation:
    """What writes predictions, on what, and where they go."""

    label: str  # "base" or "epoch-N"; "predictions" for a saved file
    output: Path
    adapter: Path | None = None  # None: the unmodified model
    settings: dict = field(default_factory=dict)  # of the adapter's training; empty without one
    ablation: str | None = None  # other audio: "silence" or "swap"

    @property
    def paper_row(self):
        """Key of tables.PAPER for the same strategy ("lora" for "full") and epoch, or the best one (3) for others.

        None where it would be no comparison: on other audio.
        """
        if self.ablation:
            return None
        if self.label.startswith("base"):
            return "base", 0
        strategy = self.settings.get("strategy")
        strategy = strategy if (strategy, 3) in tables.PAPER else "lora"
        epochs = ((strategy, self.settings.get("epoch")), (strategy, 3))
        return next(key for key in epochs if key in tables.PAPER)


@dataclass
class Row:
    """One row of the tables."""

    label: str
    paper_row: tuple | None  # key of tables.PAPER; None for what is not compared with it
    transcribed: bool  # has MDD outputs of its own, not those of the row above
    numbers: dict
    intervals: dict  # key -> (low, high); empty where the file names no speakers


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
    if how := args.audio_ablation:
        chosen += [replace(e, label=f"{e.label}, {how}", output=e.output / how, ablation=how) for e in chosen]
    return chosen


def base_model(args, settings):
    """Name and revision of the model that was fine-tuned, or that is asked for; settings: of the training."""
    import model as models

    return (
        args.model or settings.get("model", models.HUB_MODEL),
        args.revision or settings.get("revision") or models.HUB_MODEL_REVISION,
    )


def load(evaluation, args):
    """The model that an evaluation is of, with its adapter."""
    import model as models

    settings, base = evaluation.settings, evaluation.adapter is None
    model = models.load_base(
        *base_model(args, settings),
        args.dtype or settings.get("dtype", models.default_dtype()),
        args.attention or settings.get("attention", "sdpa"),
        "merge" if base else settings["speech_adapter"],  # the unmodified model hears through its speech adapter
        None if base else settings.get("quantize"),  # and is unmodified
    )
    if not base:
        models.load_trained(model, evaluation.adapter, settings["strategy"])
    return model.eval()


def generate(evaluation, utterances, args):
    """Write predictions.jsonl: the answers of one adapter, or of the unmodified model, for both tasks.

    Batches hold utterances of similar length; outputs are written in the corpus' order after every WINDOW batches.
    Under torchrun the processes share the batches of a window, and rank 0 writes. What a stopped evaluation has
    written is in predictions.jsonl.part, and --resume goes on with it.
    """
    import model as models
    import runtime

    if evaluation.ablation:
        utterances = data.ablate(utterances, evaluation.ablation)
    part, done = choose_part(evaluation, utterances, args)
    if part is None:
        return
    model = load(evaluation, args)
    if "expected" in args.scoring:
        data.encode_score_slots(model.tokenizer)  # raises here when the tokenizer cannot
    print(f"model: {evaluation.adapter or 'unmodified, prompts without control tokens'}")
    if moved := models.moved(model):
        print(f"       {models.describe_moved(moved)}")
    rank, processes = cli.process_rank(), runtime.processes()
    window = WINDOW * args.batch_size * processes
    with (
        open(part if rank == 0 else os.devnull, "a", encoding="utf-8") as file,
        tqdm(total=len(utterances), initial=done, unit="utterance", disable=rank > 0) as bar,
    ):
        for start in range(done, len(utterances), window):
            chosen = utterances[start : start + window]
            ordered = sorted(chosen, key=lambda utterance: utterance.samples)
            batches = [ordered[i : i + args.batch_size] for i in range(0, len(ordered), args.batch_size)]
            own = {}
            for batch in batches[rank::processes]:
                own |= answers(model, batch, args, control_token=evaluation.adapter is not None)
                bar.update(len(batch))
            lines = {key: line for lines in runtime.gather(own) for key, line in lines.items()}
            bar.update(start + len(chosen) - bar.n)  # what the other processes did
            for utterance in chosen:
                for task in prompts.TASKS:
                    print(json.dumps(lines[utterance.id, task], ensure_ascii=False), file=file)
            file.flush()
    if rank == 0:
        os.replace(part, evaluation.output / "predictions.jsonl")


def question(utterance, task):
    """The line of predictions.jsonl for an utterance and a task, before there is an answer."""
    return {
        "id": utterance.id,
        "task": task,
        "speaker": utterance.speaker,
        "output": None,
        "reference": data.reference(utterance, task),
    }


def choose_part(evaluation, utterances, args):
    """The file to append outputs to, and how many utterances it has already; (None, all) when there is nothing to do.

    Without --resume it starts empty. Raises InputError when what is there is broken, or of another evaluation.
    """
    import runtime

    path = evaluation.output / "predictions.jsonl"
    part, of = path.with_name("predictions.jsonl.part"), path.with_name("predictions.settings.json")
    weights = sorted(evaluation.adapter.glob("*.safetensors")) if evaluation.adapter else []
    settings = {
        "evaluated": evaluation.label,
        "adapter": str(evaluation.adapter),
        "written": [file.stat().st_mtime_ns for file in weights],  # another training writes the same names
        "model": args.model or evaluation.settings.get("model"),
        "revision": args.revision,
        "dtype": args.dtype,
        "attention": args.attention,
        "scoring": sorted(args.scoring),
        "max_new_tokens": args.max_new_tokens,
        "corpus": data.fingerprint(utterances),
    }
    lines, done, complete = [], 0, False
    if args.resume and (path.exists() or part.exists()):
        if not of.exists() or files.read_json(of, dict) != settings:
            raise cli.InputError(
                f"--resume: the outputs in {evaluation.output} are of another model, corpus or "
                f"setting: give the same ones, or choose another --output"
            )
        complete = not part.exists()
        lines, done = ([], 0) if complete else read_part(part, utterances)
    complete, done = runtime.gather((complete, done))[0]  # rank 0 decides, before it writes
    if complete:
        return None, len(utterances)
    with files.whole(of) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    with files.whole(part) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines[: done * len(prompts.TASKS)]), encoding="utf-8")
    return part, done


def read_part(part, utterances):
    """Lines of an evaluation that was stopped, and how many of the utterances, from the first on, they answer."""
    try:
        records = read_lines(part, cut_off=True)
    except cli.InputError as error:
        raise cli.InputError(f"--resume: {error}; leave out --resume to start again") from error
    asked = [question(utterance, task) for utterance in utterances for task in prompts.TASKS]
    answered = (ask.items() <= (record | {"output": None}).items() for ask, record in zip(asked, records))
    return files.read_text(part).split("\n"), sum(takewhile(bool, answered)) // len(prompts.TASKS)


def answers(model, batch, args, control_token):
    """The lines of predictions.jsonl for some utterances, as {(id, task): line}."""
    import runtime

    lines = {(u.id, task): question(u, task) for u in batch for task in prompts.TASKS}
    with runtime.autocast():
        audio = model.audio_embeddings(batch)
        for task in prompts.TASKS:
            if task == "APA" and "greedy" not in args.scoring:
                continue
            outputs = model.generate(batch, audio, task, args.max_new_tokens, control_token)
            for utterance, (text, tokens, truncated) in zip(batch, outputs, strict=True):
                lines[utterance.id, task] |= {"output": text, "tokens": tokens, "truncated": truncated}
        if "expected" in args.scoring:
            for utterance, distributions in zip(
                batch, model.score_distributions(batch, audio, control_token).tolist(), strict=True
            ):
                line = lines[utterance.id, "APA"]
                line["scores"] = dict(zip(prompts.SCORES, distributions))
                if line["output"] is None:
                    line["output"] = prompts.apa_target(
                        {name: metrics.likeliest(p) for name, p in line["scores"].items()}
                    )
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# One's own recordings


def listen(args):
    """Assess single recordings, and print what a learner wants to see of them."""
    import feedback
    import model as models
    import runtime

    words = feedback.canonical_words(args.text) if args.text else None
    utterances = [feedback.read_recording(path) for path in args.audio]
    (evaluation,) = evaluations(args)
    args.revision = models.check_model(*base_model(args, evaluation.settings))
    model, control_token = load(evaluation, args), evaluation.adapter is not None
    results = []
    for utterance in utterances:
        with runtime.autocast():
            audio = model.audio_embeddings([utterance])
            (distributions,) = model.score_distributions([utterance], audio, control_token).tolist()
            ((text, *_),) = model.generate([utterance], audio, "MDD", args.max_new_tokens, control_token)
        scores, transcript = dict(zip(prompts.SCORES, distributions)), prompts.parse_output("MDD", text)
        results.append(feedback.result(utterance.id, scores, transcript, words))
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(feedback.show(result, sys.stdout.isatty()) for result in results))


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def read_predictions(path):
    """The lines of a predictions file. Raises InputError naming the first line that is not one, or is there twice."""
    records = read_lines(path)
    if not records:
        raise cli.InputError(f"predictions {path} is empty")
    return records


def read_lines(path, cut_off=False):
    """The lines as dicts that hold what is there, no nulls. Raises InputError also for one that is there twice."""
    records = [line.model_dump(exclude_none=True) for line in files.read_lines(path, Line, cut_off)]
    first = {}
    for number, record in enumerate(records, 1):
        key = record["id"], record["task"]
        if first.setdefault(key, number) != number:
            raise cli.InputError(
                f"line {number} of {path} answers {ascii(key[0])} ({key[1]}), which line {first[key]} does: remove one"
            )
    return records


def scorings(records):
    """Which scorings of APA a predictions file holds."""
    apa = [record for record in records if record["task"] == "APA"]
    expected = bool(apa) and all("scores" in record for record in apa)
    greedy = not expected or all("tokens" in record for record in apa)
    return [name for name, held in zip(SCORINGS, (greedy, expected)) if held]


def paired(records, scoring):
    """Outputs with their references, as metrics.summarise takes them: apa, mdd."""
    apa, mdd = [], []
    for record in records:
        output = record["output"]
        if record["task"] == "MDD":
            mdd.append((prompts.parse_output("MDD", output), record["reference"]))
        elif scoring == "expected":
            apa.append(({name: metrics.expectation(p) for name, p in record["scores"].items()}, record["reference"]))
        else:
            apa.append((prompts.parse_output("APA", output), record["reference"]))
    return apa, mdd


def score(records, scoring="greedy"):
    """Numbers, and the reasons of missing ones; metrics.summarise plus shares of cut-off outputs and `utterances`."""
    numbers, reasons = metrics.summarise(*paired(records, scoring))
    for task in prompts.TASKS:
        cut = [record["truncated"] for record in records if record["task"] == task and "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = sum(cut) / len(cut) if cut else math.nan
    numbers["utterances"] = len({record["id"] for record in records})
    return numbers, reasons


def speakers_of(records, task):
    return [record.get("speaker") for record in records if record["task"] == task]


def resamples(records, apa, mdd):
    """metrics.resample of outputs; None where the file does not name two speakers or more."""
    speakers = [speakers_of(records, task) if pairs else [] for task, pairs in (("APA", apa), ("MDD", mdd))]
    named = {*speakers[0], *speakers[1]}
    if None in named or len(named) < 2:
        return None
    return metrics.resample(apa, mdd, *speakers)


def intervals(records, apa, mdd):
    samples = resamples(records, apa, mdd) or {}
    return {key: metrics.interval(values) for key, values in samples.items()}


def rows_of(records, evaluation):
    """The rows of one predictions file, one for each scoring it holds; prints why a number is missing."""
    rows = []
    for scoring in scorings(records):
        label = f"this run, {evaluation.label}" + (", expected" if scoring == "expected" else "")
        numbers, reasons = score(records, scoring)
        found = intervals(records, *paired(records, scoring))
        rows.append(Row(label, evaluation.paper_row, not rows, numbers, found))
        for key, reason in reasons.items():
            print(f"{label}: no {key}: {reason}")
    return rows


def canonical_floor(records):
    """The row of a "model" that writes what should have been said: the PER and F1 that need no listening."""
    references = [record["reference"] for record in records if record["task"] == "MDD"]
    outputs = [
        {"word_transcript": r["word_transcript"], "phoneme_transcript": " ".join(r["canonical"])} for r in references
    ]
    mdd = list(zip(outputs, references))
    return Row("says everything right", None, True, metrics.summarise([], mdd)[0], intervals(records, [], mdd))


def write_metrics(rows, evaluation):
    """metrics.json with flat keys; a number that does not exist is null, as JSON has no nan.

    _low and _high: the interval. expected_: what expected scoring changes, where greedy scoring was done as well.
    """
    values = {"evaluated": evaluation.label}
    for row in rows:
        found = row.numbers | {
            f"{key}_{end}": v for key, pair in row.intervals.items() for end, v in zip(("low", "high"), pair)
        }
        if row is rows[0]:
            values |= found
        else:
            values |= {f"expected_{key}": v for key, v in found.items() if key.startswith(prompts.SCORES)}
    with files.whole(evaluation.output / "metrics.json") as temporary:
        temporary.write_text(json.dumps({k: None if v != v else v for k, v in values.items()}, indent=2) + "\n")


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
        axis.set_title(
            f"PCC {pcc:.3f} (p = {pvalue:.1g}; paper {tables.PAPER_FIGURE_5[name]:.3f})"
            if reason is None
            else f"no PCC: {reason}"
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PER of the utterance")
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def compare(first, second):
    """Print how two predictions files of the same utterances differ, and how likely that is by chance."""
    records = [read_predictions(path) for path in (first, second)]
    keyed = [{(r["id"], r["task"]): r["reference"] for r in lines} for lines in records]
    if keyed[0] != keyed[1]:
        other = sorted(key for key in keyed[0].keys() | keyed[1].keys() if keyed[0].get(key) != keyed[1].get(key))
        raise cli.InputError(
            f"--compare {first} {second}: {len(other)} outputs are in one alone, or have other "
            f"references, such as {' '.join(other[0])}: evaluate both on one corpus"
        )
    order = {key: i for i, key in enumerate(keyed[0])}
    records = [sorted(lines, key=lambda r: order[r["id"], r["task"]]) for lines in records]
    common = [name for name in SCORINGS if all(name in scorings(lines) for lines in records)]
    chosen = [(name, name) for name in common] or [(scorings(records[0])[0], scorings(records[1])[0])]
    for pair in chosen:
        samples = [resamples(lines, *paired(lines, scoring)) for lines, scoring in zip(records, pair)]
        if None in samples:
            raise cli.InputError(
                f"--compare {first} {second}: the files name no speakers, or one alone: evaluate again"
            )
        numbers = [score(lines, scoring)[0] for lines, scoring in zip(records, pair)]
        tables.show(tables.compare(*numbers, [f"{name} {scoring}" for name, scoring in zip("AB", pair)], samples))
    right = [
        [event in metrics.RIGHT for utterance in metrics.detection_events(*_phones(lines)) for event in utterance]
        for lines in records
    ]
    ours, theirs, pvalue = metrics.mcnemar(*right)
    print(f"""
A: {first}
B: {second}
difference A - B with its interval and p-value: paired bootstrap over speakers, {metrics.RESAMPLES:,} resamples.
Detection, phone by phone: A alone is right {ours:,} times, B alone {theirs:,} times; McNemar's exact test,
p = {pvalue:.2g} (it takes phones as independent, which those of one speaker are not quite).""")


def _phones(records):
    heard, written = tables.heard_and_written(records)
    return [record["reference"]["canonical"] for record in records if record["task"] == "MDD"], heard, written


def print_drop(rows, how):
    """How much worse a model is when it hears something else: little means that it does not listen."""
    by_label = {row.label: row.numbers for row in rows}
    pairs = [
        (label, by_label[label.replace(f", {how}", "")], numbers) for label, numbers in by_label.items() if how in label
    ]
    keys = {f"{name}_pcc": name for name in prompts.SCORES} | {"wer": "WER", "per": "PER", "detection_f1": "det. F1"}
    lines = [(label, [f"{heard[key] - numbers[key]:+.3f}" for key in keys]) for label, heard, numbers in pairs]
    tables.show((f"Own audio less {how}", list(keys.values()), lines))


def main():
    """Generate where asked, score, write the files and print the tables."""
    args = parse_arguments()
    if args.summarise:
        return tables.summarise(args.summarise)
    if args.compare:
        return compare(*args.compare)
    if args.audio:
        return listen(args)
    chosen = evaluations(args)
    saved = read_predictions(args.predictions) if args.predictions else None
    check_outputs(chosen, args)
    with ExitStack() as locks:
        for evaluation in chosen:
            # what is unfinished beside an adapter may be train.py's, which is writing it now
            locks.enter_context(files.lock(evaluation.output, "evaluate", "--output", clear=False))
        evaluate(chosen, saved, args)


def check_outputs(chosen, args):
    """Raises InputError, before anything slow, where a file or folder would be replaced that was not written here."""
    if args.report:
        report.check_path(args.report)
    names = SCORED if args.predictions else SCORED + GENERATED
    scored = os.path.realpath(args.predictions) if args.predictions else None
    for folder in (evaluation.output for evaluation in chosen):
        paths = [folder / name for name in names if os.path.lexists(folder / name)]
        foreign = [path for path in paths if path.is_dir() or os.path.realpath(path) == scored]
        foreign = foreign or (paths if not written_here(folder) else [])
        if foreign:
            raise cli.InputError(
                f"{foreign[0]} would be replaced, and evaluate.py did not write it: choose another "
                f"--output, or move it away"
            )


def written_here(folder):
    """Whether a folder holds what evaluate.py alone writes."""
    try:
        return (folder / "predictions.settings.json").is_file() or bool(tables.read_metrics(folder / "metrics.json"))
    except cli.InputError:
        return False


def evaluate(chosen, saved, args):
    """Generate and score each evaluation; saved: the records of --predictions, which need no model."""
    settings, utterances, rank = chosen[-1].settings, [], cli.process_rank()
    if not saved:
        import model as models
        import runtime

        runtime.start_processes()
        asked, args.revision = args.revision, models.check_model(*base_model(args, settings))  # one for all evaluations
        if asked and not args.revision:
            raise cli.InputError(f"--revision {asked} is of a hub id, and the model is a folder: leave it out")
    if args.data or not saved:
        source = args.data or settings.get("data", data.HUB_CORPUS)
        revision = args.data_revision or settings.get("data_revision") or data.HUB_CORPUS_REVISION
        if args.data_revision and os.path.isdir(source):
            raise cli.InputError(f"--data-revision {revision} is of a hub id, and {source} is a folder: leave it out")
        utterances = data.read_corpus(source, args.split, revision, args.limit)
        print(f"corpus: {source} ({args.split}), {data.describe(utterances)}")
    rows, records = [], []
    for evaluation in chosen:
        if not saved:
            gc.collect()  # the previous model leaves the GPU before the next one comes
            generate(evaluation, utterances, args)
        if rank == 0:
            outputs = saved or read_generated(evaluation, utterances)
            rows += score_and_draw(outputs, evaluation)
            records = outputs if not evaluation.ablation else records
    if rank == 0:
        show(rows, [canonical_floor(records)], records, utterances, chosen, args)
    if not saved:
        runtime.end_processes()


def read_generated(evaluation, utterances):
    """What was generated. Raises RunError unless it is the answers to these utterances, each task once."""
    path = evaluation.output / "predictions.jsonl"
    records = read_predictions(path)
    asked = {(utterance.id, task) for utterance in utterances for task in prompts.TASKS}
    answered = {(record["id"], record["task"]) for record in records}
    if asked != answered:
        raise cli.RunError(
            f"{path} has {len(asked & answered):,} of the {len(asked):,} answers that were asked for, "
            f"and {len(answered - asked):,} others: evaluate again, without --resume"
        )
    return records


def score_and_draw(records, evaluation):
    """Write metrics.json and figure5.png of one predictions file; returns its rows."""
    rows = rows_of(records, evaluation)
    write_metrics(rows, evaluation)
    draw_figure5(records, evaluation.output / "figure5.png")
    return rows


def show(rows, floors, records, utterances, chosen, args):
    """Print the tables; write the report of the last evaluation where asked."""
    results = tables.result_tables(rows, floors)
    phones, confusions = tables.phone_tables(records)
    for table in (*results, confusions):
        tables.show(table)
    if args.audio_ablation:
        print_drop(rows, args.audio_ablation)
    print("", *(textwrap.fill(note, 118) for note in tables.explain(rows)), sep="\n")
    for row in rows:
        pvalues = [f"{name} {row.numbers[f'{name}_pvalue']:.1e}" for name in prompts.SCORES]
        print(f"p-values of the PCCs, {row.label}: {', '.join(pvalues)}")
    last = [evaluation for evaluation in chosen if not evaluation.ablation][-1]
    lines = [["phone", *phones[1]], *([phone, *texts] for phone, texts in phones[2])]
    with files.whole(last.output / "phones.tsv") as temporary:
        temporary.write_text("".join("\t".join(line) + "\n" for line in lines))
    written = "metrics.json, figure5.png" if args.predictions else "predictions.jsonl, metrics.json, figure5.png"
    print(f"\nwritten: {written} in {', '.join(str(e.output) for e in chosen)}; phones.tsv in {last.output}")
    if args.report:
        report.write_report(
            args.report,
            f"Pronunciation evaluation: {last.label}",
            [*results, phones, confusions],
            tables.explain(rows),
            records,
            {u.id: u for u in utterances},
            last.output / "figure5.png",
        )
        print(f"report: {args.report}")


if __name__ == "__main__":
    cli.run_script("evaluate.py", main)
