"""Generate with a fine-tuned model, score what it wrote, and print the row of the paper's Table 3.

    python evaluate.py --adapter out/                        # the last epoch
    python evaluate.py --adapter out/ --epochs all --base    # every epoch, and the model before fine-tuning
    python evaluate.py --predictions out/predictions.jsonl   # score a saved file, without loading a model
    torchrun --nproc-per-node 4 evaluate.py --adapter out/   # on four GPUs; writes the same predictions

Writes predictions.jsonl (raw outputs), metrics.json and figure5.png into --output, by default beside the adapter.
Every number can be computed again from predictions.jsonl; predictions.settings.json says what wrote it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
import gc
import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field

import data
import metrics
import prompts
from support import answers, cli, files
from support import run as runs
from support.later import when_used

with when_used():
    import model as models
    from support import pretrained, processes

# Paper, Table 3 (speechocean762 test set): PCC of the four scores, WER, PER, and F1, precision, recall. The last three
# are defined as detection (4.3), but their values fit phone agreement; see metrics.py.
TABLE_3 = {
    "accuracy_pcc": "accuracy",
    "fluency_pcc": "fluency",
    "prosodic_pcc": "prosodic",
    "total_pcc": "total",
    "wer": "WER",
    "per": "PER",
    "phone_agreement_f1": "agreement F1",
    "phone_agreement_precision": "P",
    "phone_agreement_recall": "R",
}
PAPER = {
    "unmodified": (-0.041, -0.017, -0.0493, -0.104, 0.97, 0.792, 0.143, 0.154, 0.134),
    "lora, epoch 1": (0.547, 0.585, 0.567, 0.544, 0.15, 0.137, 0.686, 0.689, 0.682),
    "lora, epoch 2": (0.637, 0.726, 0.709, 0.662, 0.139, 0.118, 0.722, 0.725, 0.719),
    "lora, epoch 3": (0.656, 0.727, 0.711, 0.675, 0.14, 0.114, 0.724, 0.728, 0.721),
    "lora, epoch 4": (0.645, 0.733, 0.714, 0.668, 0.148, 0.121, 0.721, 0.723, 0.72),
    "unfreeze, epoch 1": (0.535, 0.559, 0.564, 0.55, 0.159, 0.199, 0.575, 0.579, 0.57),
    "unfreeze, epoch 2": (0.624, 0.668, 0.653, 0.634, 0.145, 0.154, 0.651, 0.651, 0.651),
    "unfreeze, epoch 3": (0.621, 0.669, 0.655, 0.637, 0.148, 0.15, 0.663, 0.665, 0.662),
    "unfreeze, epoch 4": (0.743, 0.717, 0.704, 0.666, 0.142, 0.142, 0.667, 0.671, 0.663),
}
# Ids of its test part, sorted, one a line, as SHA-256: labels may change, ids do not
PAPER_CORPUS = "0eb5426df00d6fc77dcd5d64bbe80d6324c92a1fc2e0053a2b49ec1b227e6f25"
PAPER_FIGURE_5 = {"human": -0.4463, "predicted": -0.3543}  # PCC of an utterance's PER with its accuracy score
CANONICAL = "canonical phones: writing what should have been said, without listening."
CLOSE = 0.05  # a number this near to the paper's is marked
OUTPUTS = {f"{name}_mae": name for name in prompts.SCORES} | {
    "detection_f1": "detection F1",
    "apa_unparsed": "unparsed APA",
    "mdd_unparsed": "unparsed MDD",
    "apa_truncated": "cut off APA",
    "mdd_truncated": "cut off MDD",
}
PVALUES = {f"{name}_pvalue": name for name in prompts.SCORES}


@dataclass
class ModelSettings:
    """Which model answers; what is not given is as in training."""

    adapter: Path | None = None  # run folder of train.py, or one of its epoch-N folders
    epochs: str | None = None  # of a run folder: last (default), best (on held-out speakers), all, or a number
    base: bool = False  # the model before fine-tuning, prompts without control tokens (the paper's epoch 0)
    model: str | None = None  # checkpoint folder or hub id of the base model
    revision: str | None = None  # of the hub id
    dtype: runs.Dtype | None = None  # of frozen weights
    attention: runs.Attention | None = None  # of the language model
    max_new_tokens: cli.Count = data.MAX_NEW_TOKENS  # an answer longer than this is cut off and counted


@dataclass
class CorpusSettings:
    """Which utterances; what is not given is as in the evaluation, or as in training."""

    data: str | None = None  # corpus folder or hub id
    data_revision: str | None = None  # of the hub id
    data_reader: Path | None = None  # Python file that reads another layout: docs/own-data.md
    split: str = "test"  # of the corpus


@dataclass
class Settings(CorpusSettings, ModelSettings):
    predictions: Path | None = None  # score this file instead of generating
    limit: cli.Count | None = None  # use only the first N utterances
    # utterances answered together, one task after the other; 16 took 1.4 times as long as 32 on the demo's model
    batch_size: cli.Count = 32
    # of APA: the written answer (the paper's), or the expectation of each score's distribution, or both
    scoring: Annotated[tuple[Literal["greedy", "expected"], ...], Field(min_length=1)] = ("greedy",)
    resume: bool = False  # go on with outputs that were written before a stop
    output: Path | None = None  # folder for predictions.jsonl, metrics.json, figure5.png; default: beside the adapter


# ----------------------------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass
class Evaluation:
    """What writes answers, and where they go."""

    label: str  # "base" or "epoch-N"; "predictions" for a saved file that stands alone
    output: Path
    adapter: Path | None = None  # None: the unmodified model
    # of the adapter, or of one beside the unmodified model; of a saved file what stands beside it
    training: runs.TrainingSettings | answers.Writer | None = None

    @property
    def paper_row(self) -> str | None:
        """Key of PAPER for the same strategy and epoch, or the best one (3) for later ones.

        None where it is not known what wrote the answers, or where the paper has no such row.
        """
        if self.label == "base":
            return "unmodified"
        if self.training is None or self.label != f"epoch-{self.training.epoch}":
            return None
        name = f"{self.training.strategy}, {self.label.replace('-', ' ')}"
        return name if name in PAPER else f"{self.training.strategy}, epoch 3"


def evaluations(settings: ModelSettings, output: Path | None = None) -> list[Evaluation]:
    """What the settings ask for, the unmodified model first. Raises InputError where that is nothing."""
    if not (settings.adapter or settings.base):
        raise cli.InputError("nothing to evaluate: give --adapter, --base for the unmodified model, or --predictions")
    if settings.epochs and not settings.adapter:
        raise cli.InputError(f"--epochs {settings.epochs} chooses among those of a run: give --adapter as well")
    adapters = runs.adapters(settings.adapter, settings.epochs) if settings.adapter else []
    output = output or settings.adapter or Path("out/base")
    chosen = []
    if settings.base:
        training = adapters[-1][1] if adapters else None
        chosen.append(Evaluation("base", output / "base" if adapters else output, None, training))
    for folder, training in adapters:
        own = output / folder.name if len(adapters) > 1 else output
        chosen.append(Evaluation(f"epoch-{training.epoch}", own, folder, training))
    return chosen


def saved_evaluation(path: Path, output: Path | None = None) -> Evaluation:
    """What wrote a predictions file, by what evaluate.py left beside it; a file that stands alone has no paper row."""
    writer = answers.writer(path)
    evaluation = Evaluation(writer.evaluated if writer else "predictions", output or path.parent, None, writer)
    if evaluation.paper_row is None:
        cli.say(f"{path}: which training wrote it is not known, so it is compared with none of the paper's rows")
    return evaluation


# ----------------------------------------------------------------------------------------------------------------------
# Generating


Chosen = TypeVar("Chosen")  # ModelSettings, CorpusSettings, or both


def choose_model(evaluation: Evaluation, settings: Chosen) -> tuple["pretrained.Checkpoint", Chosen]:
    """The checkpoint, and the settings with those of the adapter's training where no others are asked for."""
    defaults = runs.HUB_MODEL, runs.HUB_MODEL_REVISION, models.default_dtype(), "sdpa"
    chosen = {
        name: getattr(settings, name) or getattr(evaluation.training, name, None) or default
        for name, default in zip(("model", "revision", "dtype", "attention"), defaults)
    }
    tokens = getattr(evaluation.training, "max_tokens", 0) + settings.max_new_tokens
    checkpoint = pretrained.find(chosen["model"], chosen["revision"], tokens)
    if settings.revision and not checkpoint.commit:
        raise cli.InputError(f"--revision {settings.revision} is of a hub id, and the model is a folder: leave it out")
    return checkpoint, replace(settings, **chosen | {"revision": checkpoint.commit})


def choose_corpus(evaluation: Evaluation, settings: Chosen) -> tuple[Path, Chosen]:
    """The folder, and the settings with the corpus of the evaluation or its training where no other is asked for."""
    source = settings.data or getattr(evaluation.training, "data", None) or data.HUB_CORPUS
    revision = settings.data_revision or getattr(evaluation.training, "data_revision", None) or data.HUB_CORPUS_REVISION
    folder, commit = data.find_corpus(source, revision)
    if settings.data_revision and not commit:
        raise cli.InputError(f"--data-revision {revision} is of a hub id, and {source} is a folder: leave it out")
    trained = None if settings.data else getattr(evaluation.training, "data_reader", None)
    reader = data.reader_again(settings.data_reader, trained)
    return folder, replace(settings, data=source, data_revision=commit, data_reader=reader)


def read_corpus(folder: Path, settings: CorpusSettings, limit: int | None = None) -> list[data.Utterance]:
    """The utterances of a corpus; folder, settings: of `choose_corpus`."""
    utterances = data.read_corpus(folder, settings.split, limit, settings.data_reader)
    cli.say(f"corpus: {settings.data} ({settings.split}), {data.describe(utterances)}")
    return utterances


def load(evaluation: Evaluation, checkpoint: "pretrained.Checkpoint", settings: ModelSettings) -> "models.SpeechModel":
    """The model that an evaluation is of, with its adapter; checkpoint, settings: of `choose_model`."""
    gc.collect()  # the previous model leaves the GPU first
    base, training = (checkpoint, settings.dtype, settings.attention), evaluation.training
    if evaluation.adapter is None:  # it hears through the adapter it is shipped with, and is never quantised
        return models.load_base(*base, "merge").eval()
    model = models.load_base(*base, training.speech_adapter, training.quantize)
    models.load_trained(model, evaluation.adapter, training.strategy)
    return model.eval()


def made_with(evaluation: Evaluation, utterances: Sequence[data.Utterance], settings: Settings) -> dict[str, Any]:
    """All that answers depend on, for predictions.settings.json."""
    weights = sorted(evaluation.adapter.glob("*.safetensors")) if evaluation.adapter else []
    names = ("model", "revision", "dtype", "attention", "max_new_tokens", "data", "data_revision")
    return {name: getattr(settings, name) for name in names} | {
        "evaluated": evaluation.label,
        "strategy": evaluation.training.strategy if evaluation.adapter else None,
        "epoch": evaluation.training.epoch if evaluation.adapter else None,
        "adapter": str(evaluation.adapter),
        "data_reader": settings.data_reader and str(settings.data_reader),
        "written": [file.stat().st_mtime_ns for file in weights],  # another training writes the same names
        "scoring": sorted(settings.scoring),
        "corpus": data.fingerprint(utterances),
    }


def generate(
    evaluation: Evaluation,
    checkpoint: "pretrained.Checkpoint",
    utterances: Sequence[data.Utterance],
    settings: Settings,
) -> list[dict]:
    """Write predictions.jsonl: the answers of one adapter, or of the unmodified model, and return them.

    Batches hold utterances of similar length. Under torchrun the processes share them, and rank 0 writes.
    """
    asked = [(utterance.id, task) for utterance in utterances for task in utterance.tasks]
    how = made_with(evaluation, utterances, settings)
    written = answers.Answers(evaluation.output, asked, how, settings.resume)
    missing = [u for u in utterances if any((u.id, task) not in written.lines for task in u.tasks)]
    missing.sort(key=lambda utterance: utterance.samples)
    if missing:
        model = load(evaluation, checkpoint, settings)
        if "expected" in settings.scoring:
            data.encode_score_slots(model.tokenizer)  # raises here when the tokenizer cannot
        shift = f"; {models.describe_moved(model)}" if evaluation.adapter else ""
        cli.say(f"model: {evaluation.adapter or 'unmodified, prompts without control tokens'}{shift}")
    written.start()  # not before the model is there
    rank, size = cli.process_rank(), settings.batch_size
    together = size * processes.count()
    done = len(utterances) - len(missing)
    with cli.Progress(total=len(utterances), initial=done, unit="utterance") as bar:
        for first in range(0, len(missing), together):
            batches = missing[first : first + together]
            own = batches[rank * size : (rank + 1) * size]
            arguments = settings.scoring, settings.max_new_tokens, evaluation.adapter is not None
            written.add(models.answer(model, own, *arguments) if own else [])
            bar.update(len(batches))
    return written.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class Row:
    """One row of the tables."""

    label: str
    numbers: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # none where the file names no speakers
    reasons: dict[str, str] = field(default_factory=dict)  # why a correlation is missing
    paper_row: str | None = None  # key of PAPER; None for what is not compared with it
    near: dict[str, float] = field(default_factory=dict)  # the paper's numbers, where they are of the same utterances


Table = tuple[str, Sequence[str], cli.Rows]  # caption, titles, rows


def is_papers_corpus(records: list[dict]) -> bool:
    """Whether the lines of predictions.jsonl answer the paper's 2,500 test utterances: all of them, and no others."""
    ids = "\n".join(sorted({record["id"] for record in records}))
    return hashlib.sha256(ids.encode(errors="surrogatepass")).hexdigest() == PAPER_CORPUS


def make_row(label: str, records: list[dict], scoring: str = "greedy") -> Row:
    numbers, samples, reasons = metrics.score(records, scoring, resample=True)
    return Row(label, numbers, {key: metrics.interval(values) for key, values in samples.items()}, reasons)


def rows_of(records: list[dict], label: str, paper_row: str | None) -> list[Row]:
    """A row for each scoring that predictions hold."""
    near = dict(zip(TABLE_3, PAPER[paper_row])) if paper_row and is_papers_corpus(records) else {}
    names = {"greedy": f"this run, {label}", "expected": f"this run, {label}, expected"}
    rows = [make_row(names[scoring], records, scoring) for scoring in metrics.scorings(records)]
    return [replace(row, paper_row=paper_row, near=near) for row in rows]


def copying_floor(records: list[dict]) -> Row:
    """The row of a "model" that writes what should have been said: the PER and F1 that need no listening."""
    asked = [record for record in records if record["task"] == "MDD"]
    right = [prompts.mdd_target(r["reference"]["word_transcript"], r["reference"]["canonical"]) for r in asked]
    return make_row("canonical phones", [r | {"output": output} for r, output in zip(asked, right)])


def make_table(caption: str, columns: Mapping[str, str], rows: Iterable[Row]) -> Table:
    """Numbers as text, with half the width of their intervals; columns: {key: title}.

    "-" where there is none; a number close to the paper's is marked.
    """
    lines = []
    for row in rows:
        texts = []
        for key in columns:
            value, (low, high) = row.numbers.get(key, math.nan), row.intervals.get(key, (math.nan, math.nan))
            text = f"{value:.1e}" if key in PVALUES else f"{value:.3f}"
            mark = "*" if abs(value - row.near.get(key, math.nan)) <= CLOSE else ""
            half = "" if math.isnan(low) else f"\n±{(high - low) / 2:.3f}"
            texts.append("-" if math.isnan(value) else mark + text + half)
        lines.append((row.label, texts))
    return caption, [*columns.values()], lines


def tables(rows: list[Row], floors: list[Row]) -> list[Table]:
    """What is printed of our rows; Table 3 has floors, and the paper's rows of the strategies that were evaluated."""
    strategies = {row.paper_row.split(",")[0] for row in rows if row.paper_row} - {"unmodified"}
    names = [name for name in PAPER if name.split(",")[0] in {"unmodified", *(strategies or {"lora"})}]
    paper = [Row(f"paper, {name}", dict(zip(TABLE_3, PAPER[name]))) for name in names]
    return [
        make_table("Table 3", TABLE_3, [*rows, *floors, *paper]),
        make_table("Mean error of the scores, detection, answers that cannot be read or were cut off", OUTPUTS, rows),
        make_table("p-values of the PCCs", PVALUES, rows),
    ]


def explain(rows: list[Row]) -> list[str]:
    """What the columns and rows are, one note a line."""
    utterances = ", ".join(sorted({f"{row.numbers['utterances']:,}" for row in rows}))
    return [
        f"Measured on {utterances} utterances; the paper's rows are on the 2,500 of speechocean762's test part.",
        f"Scores are PCCs with human scores; the {metrics.LEVEL:.0%} interval is a bootstrap over speakers.",
        "agreement F1, P, R: of phones by position, a reading that can give the paper's figures. detection F1: of "
        "mispronunciations, the field's convention; more of it: python -m analysis.phones.",
        f"{CANONICAL} cut off: the length limit came before the end.",
        *(f"*: within {CLOSE} of 'paper, {row.paper_row}' ({row.label})" for row in rows if row.near),
        *(f"{row.label}: no {key}: {reason}" for row in rows for key, reason in row.reasons.items()),
    ]


def draw_figure5(records: list[dict], path: Path) -> None:
    """The paper's Figure 5: PER of each utterance against its human and its predicted accuracy, with PCC."""
    from matplotlib.figure import Figure  # takes a second

    asked = [record for record in records if record["task"] == "MDD" and record["reference"]["heard"]]
    _, heard, written = metrics.phones_of(asked)
    pers = {r["id"]: metrics.error_rate([phones], [said]) for r, phones, said in zip(asked, heard, written)}
    apa = [record for record in records if record["task"] == "APA" and record["id"] in pers]
    accuracy, pers = metrics.assessment_rows(apa)[..., 0].T, np.array([pers[record["id"]] for record in apa])
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, scores in zip(axes, ("human", "predicted"), accuracy[::-1]):
        x, y = scores[~np.isnan(scores)], pers[~np.isnan(scores)]  # without answers that cannot be read
        pcc, pvalue, reason = metrics.correlation(x, y)
        title = f"PCC {pcc:.3f} (p = {pvalue:.1g}; paper {PAPER_FIGURE_5[name]:.3f})"
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(x))  # scores are whole: they would hide each other
        axis.scatter(x + jitter, y, s=8, alpha=0.25, linewidths=0)
        means = {score: y[x == score].mean() for score in np.unique(x)}
        axis.plot(means.keys(), means.values(), "_", color="C1", markersize=18, markeredgewidth=2, label="mean")
        axis.set(xlabel=f"{name} accuracy score", xlim=(-0.5, 10.5), title=f"no PCC: {reason}" if reason else title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PER of the utterance")
    axes[0].legend()
    with files.whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def score(records: list[dict], label: str, paper_row: str | None, folder: Path) -> list[Row]:
    """Write metrics.json and figure5.png; returns the rows of Table 3."""
    rows = rows_of(records, label, paper_row)
    answers.write_metrics(rows, label, folder / "metrics.json")
    draw_figure5(records, folder / "figure5.png")
    return rows


def show(rows: list[Row], floors: list[Row]) -> None:
    """Print the tables, and what is in them."""
    for caption, titles, lines in tables(rows, floors):
        cli.show_table(caption, titles, lines, own=len(rows))
    print()
    cli.say(*explain(rows), "±: half of the interval; its ends are in metrics.json.")


def main() -> None:
    """Check what the command line asks for, and evaluate."""
    settings = cli.parse(Settings, __doc__)
    saved = answers.read(settings.predictions) if settings.predictions else None
    if saved:
        others = {setting.name for setting in fields(settings)} - {"predictions", "output"}
        if idle := sorted(filter(cli.given, others)):
            raise cli.InputError(f"--predictions scores a saved file: leave out {' '.join(map(cli.flag, idle))}")
        chosen = [saved_evaluation(settings.predictions, settings.output)]
    else:
        chosen = evaluations(settings, settings.output)
    evaluate(chosen, saved, settings)


def evaluate(
    chosen: list[Evaluation],
    saved: list[dict] | None,
    settings: Settings,
    change: Callable[[list[data.Utterance]], list[data.Utterance]] = list,
) -> None:
    """Own the folders that are written into, generate, unless answers were saved, and score; print the tables.

    change: what is made of the corpus' utterances.
    """
    mark = answers.METRICS if saved else answers.SETTINGS
    written, rows = answers.SCORED if saved else (*answers.GENERATED, *answers.SCORED), []
    with ExitStack() as owned:
        for evaluation in chosen:
            owned.enter_context(files.own(evaluation.output, "evaluate.py", mark, written))
        if not saved:
            processes.start()
            checkpoint, settings = choose_model(chosen[-1], settings)  # one for all
            folder, settings = choose_corpus(chosen[-1], settings)
            utterances = change(read_corpus(folder, settings, settings.limit))
        for evaluation in chosen:
            records = saved or generate(evaluation, checkpoint, utterances, settings)
            if cli.process_rank() == 0:
                rows += score(records, evaluation.label, evaluation.paper_row, evaluation.output)
        if rows:
            show(rows, [copying_floor(records)])
            print()
            names = [name for name in written if name not in (answers.PART, answers.SETTINGS)]
            cli.say(f"written: {', '.join(names)} in {', '.join(str(e.output) for e in chosen)}")
        if not saved:
            processes.end()


if __name__ == "__main__":
    cli.run_script("evaluate.py", main)
