"""Read continuous sign language as glosses: landmarks, encoders by body part, MobileNetV3 blocks, BiLSTM, CTC.

    python -m recipes.sign_language --write-synthetic glosses            # a small data folder in the real format
    python -m recipes.sign_language --data glosses --epochs 20 --warmup 1 --learning-rate 1e-3   # chooses on dev
    python -m recipes.sign_language --data glosses --evaluate out-sign/best.safetensors      # greedy and beam, on test
    python -m recipes.sign_language --data phoenix-si5 --output phoenix                  # the document's settings

A data folder has <split>.SI5.corpus.csv (separator |) and one feature file a sequence: <split>/<id>.npz or <id>.npy,
float [T, F]. Its features.json declares the body parts in the order of the F columns, {"pose": 99, "hands": 126, ...};
without that file the order is FEATURES. Encoders and slices follow from the declaration.

Training writes into --output: settings.json, log.jsonl (one line a step), validation.jsonl (one line an epoch) and
best.safetensors, which holds weights, feature statistics, vocabulary, settings and declaration. --evaluate writes
results.json there.

Shapes: B sequences, T frames, F features of a frame, C channels, V symbols of the vocabulary (blank and unknown too).
"""

from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from functools import partial
import io
import json
import math
from pathlib import Path
import re
import time
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import metrics
from recipes import common
from support import cli, files
from support.files import write_json
from support.later import when_used

with when_used():
    from support import pretrained

COMMAND = "recipes.sign_language"


@dataclass
class Settings:
    """A source in brackets: the document, the first authors' public code, or our choice."""

    write_synthetic: Path | None = None  # write a synthetic data folder here and stop
    evaluate: Path | None = None  # instead of training: score a split of --data with this best.safetensors

    data: Path | None = None  # folder with <split>.SI5.corpus.csv and feature files
    glosses: Literal["filtered", "all"] = "filtered"  # without markers, pointing, letters, in all splits (public code)
    unchecked_order: bool = False  # train although hands are not more often missing than faces

    dropout: cli.Fraction = 0.3  # in encoders and before the LSTM (document)

    epochs: cli.Count = 100  # passes over the train split (document)
    warmup: Annotated[int, Field(ge=0)] = 5  # epochs of linear warmup (document); a cosine follows (our choice)
    learning_rate: cli.Positive = 3e-4  # peak (document)
    weight_decay: cli.Fraction = 1e-4  # of AdamW (document)
    batch_size: cli.Count = 4  # sequences in a step (document; public code 4 x 4)
    clip: cli.Positive = 1.0  # largest norm of a step's gradient (document)
    patience: cli.Count = 15  # stop after so many epochs without a lower WER on dev (document)

    split: str = "test"  # that --evaluate scores (our choice)
    beam_width: Annotated[int, Field(ge=1, le=100)] = 10  # of the prefix search (our choice); its square is the time

    seed: cli.Seed = 42  # of weights, order, augmentation, resamples (public code)
    output: Path = Path("out-sign")  # folder for all that is written (our choice)


BEST = "best.safetensors"
NUMBERS = ("wer", "low", "high", "sub", "del", "ins")  # of each search, in the table

# Columns of a frame, in this order: 33 pose, 2 x 21 hand and 468 face points with x, y, z (document), then 3 x 1629
# values that the document calls temporal: velocity, acceleration, and by the public code the raw values once more.
FEATURES = {"pose": 99, "hands": 126, "face": 1404, "temporal": 4887}
ENCODED = {"pose": 64, "hands": 128, "face": 64, "temporal": 128}  # channels of each encoder (document)
STEM = 16  # channels (document)
BLOCKS = (  # in, expanded, out, kernel, stride, squeeze-excitation, activation (document)
    (16, 16, 16, 3, 1, True, nn.ReLU),
    (16, 72, 24, 3, 2, False, nn.ReLU),
    (24, 88, 24, 3, 1, False, nn.ReLU),
    (24, 96, 40, 5, 1, True, nn.Hardswish),
    (40, 240, 40, 5, 1, True, nn.Hardswish),
    (40, 120, 48, 5, 1, True, nn.Hardswish),
)
SQUEEZE = 4  # channels go down to a quarter within squeeze-excitation (document)
HIDDEN = 128  # channels after upsampling, and of the LSTM each way (document)

BLANK, UNKNOWN = 0, 1  # of CTC (document); a gloss that training did not have (our choice)
SPECIAL = ("<blank>", "<unk>")
# Anywhere in a gloss (public code): markers, pointing, gestures. It takes words such as POSITIV along.
DROPPED = re.compile(r"__|loc-|cl-|lh-|rh-|IX|WG|\$GEST|PLUSPLUS|POS")
KEYS = ("features", "feature", "arr_0")  # of an .npz file; else its first array (public code)
SHORTEST = 5  # frames; two after the reduction by 4, so that the batch statistics of one sequence exist

SMALLEST_STD = 1e-3  # our choice: the public code's 1e-6 turns rounding errors of constant features into large values
SPEED, SPEED_SHARE = (0.9, 1.1), 0.5  # factor, and share of the sequences it is used on (public code)
NOISE, NOISE_SHARE = 0.1, 0.3  # standard deviations (our choice; public code: 0.01 of raw landmarks); public code
DROP, DROP_SHARE = 0.1, 0.2  # share of the values set to their mean (public code)

SYNTHETIC = {"pose": 9, "hands": 12, "face": 30, "temporal": 153}  # temporal: 3 x the others, as in the real features
SYNTHETIC_GLOSSES = ("WIND", "REGEN", "SONNE", "SCHNEE", "NORD", "SUED", "MORGEN", "HEUTE")
SYNTHETIC_SPLITS = {"train": (400, 8), "dev": (60, 4), "test": (120, 8)}  # sequences, signers: no signer in two splits


def check(settings: Settings) -> None:
    """Raises InputError for settings that cannot work together."""
    if settings.write_synthetic:
        common.refuse_unused(settings, "write_synthetic", "seed")
    elif not settings.data:
        raise cli.InputError("--data is missing: give a data folder, or make one with --write-synthetic FOLDER")
    elif settings.evaluate:
        common.refuse_unused(settings, "evaluate", "data", "batch_size", "seed", "output", "split", "beam_width")
    elif settings.warmup >= settings.epochs:
        raise cli.InputError(
            f"--warmup {settings.warmup} epochs leave nothing of --epochs {settings.epochs}: lower --warmup"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    signer: str
    glosses: tuple[str, ...]  # after the filter
    path: Path  # of the feature file
    frames: int

    @property
    def possible(self):
        return common.frames_needed(self.glosses) <= self.frames


# All four, in the order of the columns
Groups = Annotated[
    dict[Literal[tuple(ENCODED)], Annotated[int, Field(strict=True, gt=1)]], Field(min_length=len(ENCODED))
]


def read_features_order(folder):
    """{group: columns} in the order of the columns, by features.json or FEATURES. Raises InputError."""
    path = folder / "features.json"
    return files.read_json(path, Groups) if path.is_file() else dict(FEATURES)


def read_split(folder, split, groups, which):
    """The sequences of one split, every feature file read once. which: "filtered" or "all" glosses.

    Raises InputError with one line for every row or file that cannot be used.
    """
    rows = read_annotations(folder / f"{split}.SI5.corpus.csv")
    repeated = {id for id, count in Counter(id for _, id, _, _ in rows).items() if count > 1}

    def read(row):
        _, id, signer, glosses = row
        path = folder / split / f"{id}.npz"
        path = path if path.is_file() else folder / f"{id}.npy"
        if id in repeated:
            raise cli.InputError("its id stands in several lines")
        if reserved := set(glosses) & set(SPECIAL):
            raise cli.InputError(f"{', '.join(sorted(reserved))} is no gloss, the name is taken: rename it")
        kept = [gloss for gloss in glosses if which == "all" or len(gloss) > 1 and not DROPPED.search(gloss)]
        return Sample(id, signer, tuple(kept), path, len(read_features(path, sum(groups.values()))))

    named = [(f"line {row[0]}, {row[1]}", row) for row in rows]
    samples = common.every(named, read, f"sequences of {folder} ({split})")
    if not any(sample.glosses for sample in samples):
        raise cli.InputError(f"{folder} ({split}) has no glosses: with --glosses all markers and letters are kept")
    describe(split, samples, sum(len(row[-1]) for row in rows) - sum(len(sample.glosses) for sample in samples))
    return samples


def read_annotations(path):
    """Rows of an SI5 corpus file: [(line number, id, signer, glosses)]. Raises InputError."""
    columns, *rows = (line.rstrip("\r").split("|") for line in files.read_text(path).rstrip("\n").split("\n"))
    key = "id" if "id" in columns else "name"
    if missing := [name for name in (key, "signer", "annotation") if name not in columns]:
        raise cli.InputError(f"{path} has no column {' and '.join(missing)} (separator |), but {columns}")
    id, signer, annotation = map(columns.index, (key, "signer", "annotation"))
    if bad := [str(line) for line, row in enumerate(rows, 2) if len(row) != len(columns) or not row[id]]:
        raise cli.InputError(f"{path} needs {len(columns)} fields and an id in line {', '.join(bad)}: repair it")
    return [(line, row[id], row[signer], row[annotation].split()) for line, row in enumerate(rows, 2)]


def read_features(path, width):
    """A feature file, float32 (T, width). Raises InputError when it is missing, corrupt or of another shape."""
    content = files.read_bytes(path)
    try:
        content = np.load(io.BytesIO(content))
        if not isinstance(content, np.ndarray):
            content = content[next(key for key in (*KEYS, *content.files) if key in content.files)]
    except Exception as error:  # of numpy, zipfile, zlib, tokenize
        raise cli.InputError(f"{path} is not a readable array: {cli.first_line(error)}") from error
    if content.ndim != 2 or content.shape[1] != width or not np.issubdtype(content.dtype, np.floating):
        raise cli.InputError(f"{path} has {content.dtype} {list(content.shape)} instead of float [T, {width}]")
    if len(content) < SHORTEST:
        raise cli.InputError(f"{path} has {len(content)} frames, fewer than {SHORTEST}")
    with np.errstate(over="ignore"):  # the check finds it
        content = content.astype(np.float32)
    if not np.isfinite(content).all():
        raise cli.InputError(f"{path} has {(~np.isfinite(content)).sum()} values that are not finite in float32")
    return content


def describe(split, samples, dropped):
    """Print what a split holds, and what of it CTC cannot learn."""
    impossible = [sample.id for sample in samples if not sample.possible]
    signers = len({sample.signer for sample in samples})
    frames, glosses = (sum(counts) for counts in zip(*((s.frames, len(s.glosses)) for s in samples)))
    cli.say(
        f"{split}: {len(samples):,} sequences of {signers} signers, {frames:,} frames, {glosses:,} glosses "
        f"({dropped:,} left out by the filter), {sum(not s.glosses for s in samples)} sequences without any"
    )
    if impossible:
        cli.say(
            f"{split}: {len(impossible)} sequences have more glosses than CTC can write in their frames; training "
            f"leaves them out, the WER counts them: {', '.join(impossible[:5])}"
        )


def compare_with_training(split, samples, model):
    """Print and return what a held-out split has that training did not have, and the other way round."""
    unknown = [gloss for sample in samples for gloss in sample.glosses if gloss not in model.vocabulary]
    shared = sorted({sample.signer for sample in samples} & set(model.signers))
    cli.say(
        f"{split}: {len(unknown)} glosses ({len(set(unknown))} different ones) are not in the vocabulary of "
        f"{len(model.vocabulary)}, each is an error of the WER; signers that training has too: "
        f"{', '.join(shared) or 'none'}"
    )
    return {"unknown_glosses": len(unknown), "signers_of_training": shared}


def feature_statistics(samples, groups):
    """Mean and standard deviation of every feature, float32 (F,), and {group: share of frames where it is missing}.

    Missing: the group's first half, or its second, is exactly 0 throughout. The hands' halves are left and right.
    """
    *ends, width = np.cumsum(list(groups.values()))
    count, sums, squares, missing = 0, np.zeros(width), np.zeros(width), Counter()
    for sample in cli.Progress(samples, desc="statistics"):
        frames = read_features(sample.path, width).astype(np.float64)  # (T, F)
        count, sums, squares = count + len(frames), sums + frames.sum(axis=0), squares + (frames**2).sum(axis=0)
        for name, part in zip(groups, np.split(frames == 0, ends, axis=1)):
            halves = np.array_split(part, 2, axis=1)
            missing[name] += int(np.logical_or(*(half.all(axis=1) for half in halves)).sum())
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    shares = {name: missing[name] / count for name in groups}
    return mean.astype(np.float32), np.maximum(std, SMALLEST_STD).astype(np.float32), shares


def check_order(missing, unchecked):
    """Raises InputError when "hands" do not look like hands: a tracker loses hands, and writes zeros, more than faces.

    Hands and face in each other's columns are seen. Not seen: left and right exchanged, an order within a group,
    pose exchanged with what is never missing, and everything about temporal.
    """
    shares = ", ".join(f"{name} {share:.1%}" for name, share in missing.items())
    cli.say(f"frames with a half of the group exactly zero: {shares}")
    if missing["hands"] <= missing["face"] and not unchecked:
        raise cli.InputError(
            f"hands are missing in {missing['hands']:.1%} of the frames and faces in {missing['face']:.1%}, so these "
            f"columns may not be what they are named: correct features.json, or add --unchecked-order if lost hands "
            f"are not zeros"
        )


class Batch(NamedTuple):
    samples: list  # longest first
    features: torch.Tensor  # (B, T, F), padded with zeros
    lengths: torch.Tensor  # (B,) frames; on the CPU
    targets: torch.Tensor  # (all glosses,)
    target_lengths: torch.Tensor  # (B,)


def make_batch(samples, model, rng=None):
    """A Batch on common.DEVICE, longest sequence first. rng: for augmentation, which is left out without it."""
    mean, std = (values.cpu().numpy() for values in (model.mean, model.std))
    loaded = []
    for sample in samples:
        frames = (read_features(sample.path, len(mean)) - mean) / std  # (T, F)
        frames = augment(frames, common.frames_needed(sample.glosses), rng) if rng else frames
        loaded.append((sample, torch.from_numpy(frames)))
    loaded.sort(key=lambda pair: -len(pair[1]))
    samples, features = map(list, zip(*loaded))
    targets = [torch.tensor(model.encode(sample.glosses), dtype=torch.long) for sample in samples]
    lengths, target_lengths = (torch.tensor([len(row) for row in rows]) for rows in (features, targets))
    features = pad_sequence(features, batch_first=True)
    return Batch(samples, features.to(common.DEVICE), lengths, torch.cat(targets).to(common.DEVICE), target_lengths)


def augment(frames, needed, rng):
    """Another speed, noise, dropped values, each on a share of the sequences; (T, F) to (T', F), T' >= needed.

    frames: normalised, so that the noise is as strong in every feature and a dropped value is its mean.
    """
    if rng.random() < SPEED_SHARE:
        length = max(round(len(frames) / rng.uniform(*SPEED)), needed, SHORTEST)
        frames = frames[np.linspace(0, len(frames) - 1, length).round().astype(int)]
    if rng.random() < NOISE_SHARE:
        frames = frames + np.float32(NOISE) * rng.standard_normal(frames.shape, dtype=np.float32)
    if rng.random() < DROP_SHARE:
        frames = frames * (rng.random(frames.shape, dtype=np.float32) >= DROP)
    return frames


# ----------------------------------------------------------------------------------------------------------------------
# Model. Padded frames are zero before every convolution, as beyond the end of a sequence that is alone, and enter no
# mean: a sequence has the same output in every batch, and padding moves no running statistic.


class ConvNorm(nn.Module):
    """Convolution over time, batch norm, activation, of the frames that are there alone; the others become 0."""

    def __init__(self, conv, activation=nn.Identity):
        super().__init__()
        self.conv, self.norm, self.activation = conv, nn.BatchNorm1d(conv.out_channels), activation()

    def forward(self, x, mask):  # (B, C, T); mask (B, T') of the output's frames
        x = self.conv(x)[..., : mask.shape[1]].transpose(1, 2)  # (B, T', C)
        y = self.activation(self.norm(x[mask]))  # (frames, C)
        return torch.zeros_like(x).masked_scatter(mask[..., None], y.to(x.dtype)).transpose(1, 2)


def same_conv(inputs, outputs, kernel, stride=1, groups=1, bias=False):
    """A convolution to ceil(T / stride) frames."""
    return nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Block(nn.Module):
    """MobileNetV3's inverted residual, over time."""

    def __init__(self, inputs, expanded, outputs, kernel, stride, squeeze, activation):
        super().__init__()
        depthwise = same_conv(expanded, expanded, kernel, stride, groups=expanded)
        self.expand = ConvNorm(same_conv(inputs, expanded, 1), activation) if expanded != inputs else None
        self.depthwise = ConvNorm(depthwise, activation)
        self.squeeze = None
        if squeeze:
            down, up = nn.Conv1d(expanded, expanded // SQUEEZE, 1), nn.Conv1d(expanded // SQUEEZE, expanded, 1)
            self.squeeze = nn.Sequential(OrderedDict(down=down, relu=nn.ReLU(), up=up, sigmoid=nn.Sigmoid()))
        self.project = ConvNorm(same_conv(expanded, outputs, 1))
        self.stride, self.residual = stride, stride == 1 and inputs == outputs

    def forward(self, x, mask):  # (B, C, T), (B, T) to (B, C', ceil(T / stride)) and its mask
        after = mask[:, :: self.stride]
        y = self.expand(x, mask) if self.expand else x
        y = self.depthwise(y, after)
        if self.squeeze:
            mean = y.sum(dim=2, keepdim=True) / after.sum(dim=1)[:, None, None]  # (B, C, 1), over frames that are there
            y = y * self.squeeze(mean)
        y = self.project(y, after)
        return x + y if self.residual else y, after


def new_encoder(inputs, outputs, dropout):
    hidden = (inputs + outputs) // 2
    narrow, widen = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(narrow, nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout), widen, nn.LayerNorm(outputs))


class Student(nn.Module):
    """All that is needed to read signs: it keeps the features' statistics, and takes normalised ones.

    groups: {name: columns} in order; vocabulary: V symbols, SPECIAL first; signers: of training.
    """

    def __init__(self, groups, vocabulary, signers=(), dropout=0.3):
        super().__init__()
        self.groups, self.vocabulary, self.signers = groups, vocabulary, signers
        self.register_buffer("mean", torch.zeros(sum(groups.values())))
        self.register_buffer("std", torch.ones(sum(groups.values())))
        encoders = {name: new_encoder(width, ENCODED[name], dropout) for name, width in groups.items()}
        self.encoders = nn.ModuleDict(encoders)
        self.stem = ConvNorm(same_conv(sum(ENCODED.values()), STEM, 3, stride=2), nn.Hardswish)
        self.blocks = nn.ModuleList(Block(*block) for block in BLOCKS)
        self.upsample = ConvNorm(nn.ConvTranspose1d(BLOCKS[-1][2], HIDDEN, 4, stride=4), nn.ReLU)
        self.projection = ConvNorm(same_conv(HIDDEN, HIDDEN, 3, bias=True), nn.ReLU)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * HIDDEN, len(vocabulary))

    def encode(self, glosses):
        """Ids; a gloss that training did not have is UNKNOWN, never the blank."""
        ids = {gloss: id for id, gloss in enumerate(self.vocabulary)}
        return [ids.get(gloss, UNKNOWN) for gloss in glosses]

    def forward(self, features, lengths):
        """Log-probabilities (T, B, V), float32. features: (B, T, F); lengths: (B,) on the CPU, frames of each row."""
        frames = features.shape[1]
        mask = (torch.arange(frames) < lengths[:, None]).to(features.device)  # (B, T)
        parts = zip(self.encoders.values(), features.split(list(self.groups.values()), dim=2))
        x = torch.cat([encoder(part) for encoder, part in parts], dim=2).transpose(1, 2)  # (B, C, T)
        reduced = mask[:, ::2]
        x = self.stem(x * mask[:, None], reduced)  # (B, C, T/2)
        for block in self.blocks:
            x, reduced = block(x, reduced)  # (B, C, T/2), after block 2 (B, C, T/4)
        x = self.projection(self.upsample(x, mask), mask)  # (B, C, T)
        x = self.dropout(x).transpose(1, 2)  # (B, T, C)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=frames)
        return self.output(x).transpose(0, 1).log_softmax(dim=2, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(settings: Settings) -> None:
    """One run, from the data folder to best.safetensors. Raises InputError before anything slow when input is wrong."""
    with common.new_run(settings, COMMAND, BEST, ["log.jsonl", "validation.jsonl"], "torch") as record:
        groups = read_features_order(settings.data)
        samples, dev = (read_split(settings.data, split, groups, settings.glosses) for split in ("train", "dev"))
        samples = [sample for sample in samples if sample.possible]
        if not samples:
            raise cli.InputError(f"no train sequence of {settings.data} has enough frames for its glosses: check both")
        mean, std, missing = feature_statistics(samples, groups)
        check_order(missing, settings.unchecked_order)
        # In the order they are first seen (public code)
        vocabulary = [*SPECIAL, *dict.fromkeys(gloss for sample in samples for gloss in sample.glosses)]
        torch.manual_seed(settings.seed)
        model = Student(groups, vocabulary, sorted({sample.signer for sample in samples}), settings.dropout)
        model.mean, model.std = torch.from_numpy(mean), torch.from_numpy(std)
        total = sum(parameter.numel() for parameter in model.parameters())
        cli.say(f"model: {total:,} parameters, {total * 4 / 2**20:.2f} MiB in float32, on {common.DEVICE}")
        compare_with_training("dev", dev, model)
        run_epochs(model.to(common.DEVICE), samples, dev, settings, record)


def run_epochs(model, samples, dev, settings, record):
    """Train, and keep the epoch with the lowest WER on dev; stop after --patience epochs without a lower one.

    Of equal WERs the lower loss is better: at first, CTC writes blanks alone for some epochs, and learns nevertheless.
    """
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    per_epoch, validated, started = math.ceil(len(samples) / settings.batch_size), [], time.perf_counter()
    where = settings.warmup * per_epoch, settings, settings.output
    for epoch in common.train(model, optimiser, partial(steps_of, model, samples, settings), per_epoch, *where):
        loss, references, (read,) = transcribe(model, dev, settings.batch_size, [greedy_search])
        validated.append({"epoch": epoch, "wer": metrics.error_rate(references, read), "loss": loss})
        common.write_lines(settings.output / "validation.jsonl", validated)
        best = min(validated, key=lambda line: (line["wer"], math.inf if line["loss"] is None else line["loss"]))
        cli.say(f"epoch {epoch}: WER on dev {validated[-1]['wer']:.3f}, best {best['wer']:.3f}")
        if best is validated[-1]:
            save(settings.output / BEST, model, record | {"epoch": epoch, "dev_wer": best["wer"]})
        if epoch - best["epoch"] >= settings.patience:
            cli.say(f"no lower WER on dev for {settings.patience} epochs: stopping early, after epoch {epoch}")
            break
    cli.say(
        f"{time.perf_counter() - started:.0f} s; kept: epoch {best['epoch']} for its WER of {best['wer']:.3f} on dev; "
        f"next: --data {settings.data} --evaluate {settings.output}/{BEST}"
    )


def steps_of(model, samples, settings, epoch):
    """What each step of an epoch takes, in an order that depends on seed and epoch alone."""
    rng = np.random.default_rng((settings.seed, epoch))
    order = rng.permutation(len(samples))
    for first in range(0, len(order), settings.batch_size):
        batch = make_batch([samples[i] for i in order[first : first + settings.batch_size]], model, rng)
        losses, _ = sequence_losses(model, batch)
        yield [([sample.id for sample in batch.samples], losses.sum() / len(losses))]  # the mean over its sequences


def sequence_losses(model, batch):
    """CTC loss of each sequence divided by its glosses, (B,), and log-probabilities (T, B, V).

    An impossible sequence would have an infinite loss; it gets 0 and no gradient, so what is impossible is counted.
    """
    with common.autocast():
        log_probs = model(batch.features, batch.lengths)
    ctc = nn.CTCLoss(blank=BLANK, reduction="none", zero_infinity=True)
    losses = ctc(log_probs, batch.targets, batch.lengths, batch.target_lengths)
    return losses / batch.target_lengths.clamp(min=1).to(losses.device), log_probs


def save(path, model, record):
    """The Student and the record of its training, in one file that executes nothing."""
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    about = {"vocabulary": model.vocabulary, "features": model.groups, "signers": model.signers}
    with files.whole(path) as temporary:
        save_file(weights, temporary, {"about": json.dumps(about | {"training": record})})


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


class Training(files.Shape):
    """What of the record of a training is read again."""

    glosses: Literal["filtered", "all"]
    epoch: int
    dev_wer: float


class About(files.Shape):
    """What best.safetensors says beside its tensors."""

    vocabulary: list[str]
    features: Groups
    signers: list[str]
    training: Training


def load(path: Path) -> tuple[Student, Training]:
    """(Student, its Training) of a best.safetensors. Raises InputError when it is none."""
    if not path.is_file():
        raise cli.InputError(f"--evaluate {path} is missing, or not a regular file")
    with pretrained.loading(path):
        with safe_open(path, "pt") as file:
            about = files.check_json(About, file.metadata()["about"], path)
            weights = {key.removeprefix("model."): file.get_tensor(key) for key in file.keys()}
        model = Student(about.features, about.vocabulary, about.signers)
        model.load_state_dict(weights)
    common.check_finite(model, path)
    return model.to(common.DEVICE), about.training


@torch.no_grad()
def transcribe(model, samples, batch_size, searches):
    """Mean loss of the possible sequences; of all, in their order: the glosses, and what each search reads."""
    model.eval()
    losses, read = [], {}
    ordered = sorted(samples, key=lambda sample: -sample.frames)  # little padding
    for first in cli.Progress(range(0, len(ordered), batch_size), desc="transcribe"):
        batch = make_batch(ordered[first : first + batch_size], model)
        batch_losses, log_probs = sequence_losses(model, batch)
        losses += [loss for loss, sample in zip(batch_losses.tolist(), batch.samples) if sample.possible]
        for row, sample in enumerate(batch.samples):
            frames = log_probs[: batch.lengths[row], row].cpu()  # (T, V)
            read[sample.id] = [[model.vocabulary[id] for id in search(frames)] for search in searches]
    references = [list(sample.glosses) for sample in samples]
    loss = sum(losses) / len(losses) if losses else None
    return loss, references, [list(words) for words in zip(*(read[sample.id] for sample in samples))]


def greedy_search(log_probs):
    """The likeliest symbol of each frame, repeats joined, blanks left out. log_probs: (T, V). Returns ids."""
    ids = torch.unique_consecutive(log_probs.argmax(dim=1))
    return ids[ids != BLANK].tolist()


def beam_search(log_probs, width):
    """The likeliest glosses, summed over their alignments; ids. log_probs: (T, V).

    After each frame the `width` likeliest prefixes stay, and of each frame the `width` likeliest symbols are tried.
    """
    beams = {(): (0.0, -math.inf)}  # prefix: log-probability of alignments that end with a blank, with its last symbol
    values, symbols = log_probs.topk(min(width, log_probs.shape[1]), dim=1)
    for frame in zip(values.tolist(), symbols.tolist()):
        longer = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (after_blank, after_symbol) in beams.items():
            either = np.logaddexp(after_blank, after_symbol)
            for value, symbol in zip(*frame):
                if symbol == BLANK:
                    grown = [(prefix, 0, value + either)]
                elif prefix and symbol == prefix[-1]:
                    grown = [(prefix, 1, value + after_symbol), ((*prefix, symbol), 1, value + after_blank)]
                else:
                    grown = [((*prefix, symbol), 1, value + either)]
                for written, end, added in grown:
                    longer[written][end] = np.logaddexp(longer[written][end], added)
        likeliest = sorted(longer.items(), key=lambda item: -np.logaddexp(*item[1]))
        beams = dict(likeliest[:width])
    return list(next(iter(beams)))


def evaluate(settings: Settings) -> None:
    """Score one split with a checkpoint, by greedy and beam search; writes results.json. Raises InputError."""
    with files.own(settings.output, COMMAND, "results.json", ["results.json"]):
        model, training = load(settings.evaluate)
        groups = read_features_order(settings.data)
        if list(groups.items()) != list(model.groups.items()):
            raise cli.InputError(f"{settings.data} has the features {groups}; {settings.evaluate} needs {model.groups}")
        samples = read_split(settings.data, settings.split, groups, training.glosses)
        results = {"written_by": files.signature(COMMAND), "checkpoint": str(settings.evaluate)}
        results |= {"data": str(settings.data), "split": settings.split}
        results |= {"sequences": len(samples), "beam_width": settings.beam_width}
        results["impossible"] = [sample.id for sample in samples if not sample.possible]
        results |= compare_with_training(settings.split, samples, model)
        searches = {"greedy": greedy_search, "beam": partial(beam_search, width=settings.beam_width)}
        results["loss"], references, read = transcribe(model, samples, settings.batch_size, searches.values())
        for name, hypotheses in zip(searches, read):
            results[name] = wer_with_interval(references, hypotheses, samples, settings.seed)
        lines = zip([sample.id for sample in samples], references, *read)
        results["predictions"] = [dict(zip(("id", "reference", *searches), line)) for line in lines]
        write_json(settings.output / "results.json", results)
    rows = [(name, [f"{results[name][key]:.3f}" for key in NUMBERS]) for name in searches]
    caption = f"{settings.output / 'results.json'}; interval over {results['greedy']['resampled']}"
    cli.show_table(caption, NUMBERS, rows)


def wer_with_interval(references, hypotheses, samples, seed):
    """WER, never capped, with its parts and a 95 % interval by bootstrap over signers, or sequences of a single one.

    The interval over sequences of one signer says nothing about other signers.
    """
    counts = metrics.error_counts(references, hypotheses)  # (N, 4)
    over = "signer" if len({sample.signer for sample in samples}) > 1 else "id"
    names = [getattr(sample, over) for sample in samples]
    low, high = metrics.interval(common.resampled_ratio(counts[:, :3].sum(axis=1), counts[:, 3], names, seed))
    *errors, words = counts.sum(axis=0).tolist()
    parts = {name: number / words for name, number in zip(("sub", "del", "ins"), errors)}
    resampled = "signers" if over == "signer" else "sequences"
    return {"wer": sum(errors) / words, "low": low, "high": high, "resampled": resampled, **parts}


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic data, in the format of the real one


def write_synthetic(folder, seed, splits=None):
    """A data folder of synthetic glosses. splits: {name: (sequences, signers)}, SYNTHETIC_SPLITS if not given.

    A gloss is a movement between two postures over 8-15 frames; every second one is the movement before it backwards,
    so the order of frames decides. Signers differ by an offset and an extent, and no signer is in two splits. Noise has
    half the postures' spread. A hand that is lost for a gloss is exactly zero, as trackers write it.
    """
    if folder.exists():
        raise cli.InputError(f"{folder} exists already: remove it or choose another --write-synthetic")
    rng = np.random.default_rng(seed)
    raw = sum(width for name, width in SYNTHETIC.items() if name != "temporal")
    postures = rng.normal(size=(len(SYNTHETIC_GLOSSES) // 2, 2, raw))  # (movements, from and to, F)
    movements = [pair for posture in postures for pair in (posture, posture[::-1])]
    with files.whole(folder) as temporary:
        temporary.mkdir()
        (temporary / "features.json").write_text(json.dumps(SYNTHETIC) + "\n")
        for split, (sequences, split_signers) in (splits or SYNTHETIC_SPLITS).items():
            (temporary / split).mkdir()
            names = [f"{split}-signer-{i:02d}" for i in range(split_signers)]
            bodies = {name: (rng.normal(0, 0.3, raw), rng.uniform(0.8, 1.2)) for name in names}
            lines = ["id|folder|signer|annotation"]
            for i in range(sequences):
                id, signer = f"{split}-{i:04d}", names[i % split_signers]
                chosen = rng.integers(len(movements), size=rng.integers(3, 8))
                frames = synthetic_frames([movements[gloss] for gloss in chosen], *bodies[signer], rng)
                np.savez(temporary / split / f"{id}.npz", features=frames)
                words = ["__ON__", *(SYNTHETIC_GLOSSES[gloss] for gloss in chosen), "__OFF__"]
                lines.append(f"{id}|{id}/1/*.png|{signer}|{' '.join(words)}")
            (temporary / f"{split}.SI5.corpus.csv").write_text("\n".join(lines) + "\n")


def synthetic_frames(movements, offset, extent, rng):
    """Features of one sequence, float32 (T, 4 x raw): raw, velocity, acceleration, raw once more."""
    left_hand, right_hand = np.array_split(SYNTHETIC["pose"] + np.arange(SYNTHETIC["hands"]), 2)
    rows = []
    for start, end in movements:
        way = np.linspace(0, 1, rng.integers(8, 16))[:, None]  # (T, 1)
        row = offset + extent * (start + way * (end - start))
        row = row + rng.normal(0, 0.5, row.shape)
        if rng.random() < 0.2:
            row[:, (left_hand, right_hand)[rng.integers(2)]] = 0
        rows.append(row)
    raw = np.concatenate(rows)  # (T, raw)
    velocity = np.diff(raw, axis=0, prepend=raw[:1])
    acceleration = np.diff(velocity, axis=0, prepend=velocity[:1])
    return np.concatenate([raw, velocity, acceleration, raw], axis=1).astype(np.float32)


def main() -> None:
    settings = cli.parse(Settings, __doc__.split("\n", 1)[0])
    check(settings)
    if settings.write_synthetic:
        write_synthetic(settings.write_synthetic, settings.seed)
        splits = f"synthetic glosses, splits (sequences, signers) {SYNTHETIC_SPLITS}"
        cli.say(f"{settings.write_synthetic}: {splits}")
    elif settings.evaluate:
        evaluate(settings)
    else:
        train(settings)


if __name__ == "__main__":
    cli.run_script(COMMAND, main)
