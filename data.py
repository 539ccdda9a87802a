"""What is one utterance, one example, one batch.

A speechocean762 record (paper 4.1), utterance 000010113 without its first four words:

    "THEME PARK"  accuracy 6, fluency 9, prosodic 8, total 5
        THEME  phones TH IY0 M    accuracy 2   mispronunciations: index 1, IY heard as <unk>
        PARK   phones P AA0 R K   accuracy 10

gives two examples, one a task (Table 2). The phone transcript is what was *heard*, not the dictionary's:

    APA  {"accuracy": 6, "fluency": 9, "prosodic": 8, "total": 5}
    MDD  {"word_transcript": "THEME PARK", "phoneme_transcript": "TH <unk> M P AA R K"}

Shapes: S samples, F feature frames, B rows of a batch, T tokens of a row.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
import hashlib
import importlib.util
from itertools import islice
import json
import math
import os
from pathlib import Path
import re
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

import prompts
from support import cli, files, sound
from support.sound import FRAME, SAMPLE_RATE

HOP = 160  # samples (10 ms) between windows
FRAMES_PER_TOKEN = 8  # the audio encoder's subsampling: one embedding every 80 ms
LONGEST = 10_000  # characters of a text or a phone
IGNORE = -100  # label of positions without loss, PyTorch's cross-entropy default
MAX_NEW_TOKENS = 400  # of a generated answer; the corpus' longest has 46 phones

HUB_CORPUS = "mispeech/speechocean762"
# The dataset's main in 2025, when the paper was written. The labels corrected on 2026-04-30 are in
# 06385584fad212b26134c656fdd3ccf9f093f33e.
HUB_CORPUS_REVISION = "f95618ea1353303f34cf186b9c310fa2c1eb02c8"
HUB_FILES = ["*.parquet", "README.md"]  # README.md says which file is of which split


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    canonical: tuple[str, ...]  # phones that should be said, no stress digits
    heard: tuple[str, ...]  # phones that raters heard
    mispronounced: int  # how many canonical phones were labelled as mispronounced


@dataclass(frozen=True, slots=True)
class Utterance:
    id: str
    recording: Callable[[], bytes]  # the sound file's content, read when it is needed
    samples: int  # length at SAMPLE_RATE
    text: str
    scores: dict[str, int] | None  # the four of prompts.SCORES, 0-10
    words: tuple[Word, ...]  # empty: nobody labelled the phones
    speaker: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it has labels for."""
        return tuple(task for task, labels in zip(prompts.TASKS, (self.scores, self.words)) if labels)

    @property
    def canonical(self) -> list[str]:
        return [phone for word in self.words for phone in word.canonical]

    @property
    def heard(self) -> list[str]:
        return [phone for word in self.words for phone in word.heard]

    @property
    def audio_tokens(self) -> int:
        """How many embeddings the audio encoder makes of the recording."""
        frames = (self.samples - FRAME) // HOP + 1
        return math.ceil(frames / FRAMES_PER_TOKEN)


# ----------------------------------------------------------------------------------------------------------------------
# The corpus


def read_corpus(folder: Path, split: str, limit: int | None = None, reader: Path | None = None) -> list[Utterance]:
    """The utterances of one split, all of them checked.

    folder: in the layout of the public release, or of the hub's data set, or of `reader`, a Python file: see
    `load_reader`. limit: only the first N. Raises InputError with one line for every utterance that cannot be used.
    """
    read = load_reader(reader) if reader else read_hub if any(folder.glob("data/*.parquet")) else read_folder
    utterances, problems = {}, []
    for id, make in islice(read(folder, split), limit):
        try:
            utterance = make()
            check(utterance)
            if utterances.setdefault(utterance.id, utterance) is not utterance:
                raise cli.InputError(f"another utterance has the id {utterance.id}")
        except cli.InputError as error:
            problems.append(f"{id}: {error}")
    if problems:
        raise cli.InputError(
            f"{len(problems)} utterances of {folder} ({split}) cannot be used; repair or remove them:", *problems
        )
    if not utterances:
        raise cli.InputError(f"{folder} has no utterances in split {split!r}")
    return [*utterances.values()]


def find_corpus(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a corpus, of a hub id after a download, and the hub's commit, None for a folder.

    Raises InputError when there is none.
    """
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and not os.path.isdir(Path(source).parent)
    if not hub_id and not os.path.isdir(source):  # Path.is_dir raises for a name that is too long
        raise cli.InputError(f"corpus folder {source} does not exist: give a folder or a hub id such as {HUB_CORPUS}")
    return files.fetch(source, revision, "dataset", HUB_FILES)


def check(utterance: Utterance) -> None:
    """Raises InputError for labels that must not be trained on or scored, whichever reader they are from."""
    if not utterance.tasks:
        raise cli.InputError("it has neither scores nor words")
    for text in (utterance.text, *(word.text for word in utterance.words)):
        if not text.strip() or len(text) > LONGEST or re.search("[\x00-\x1f\x7f\ud800-\udfff]|<\\|", text):
            raise cli.InputError(f"text {text!r:.40}: a line of text, without <| which starts a control token")
    for phone in utterance.canonical + utterance.heard:
        if not re.fullmatch(r"[^\s\d|]+", phone) or len(phone) > LONGEST or not phone.isprintable():
            raise cli.InputError(f"phones, {phone!r:.40}: each is one sign such as AH, without stress")
    if not all(word.canonical for word in utterance.words):
        raise cli.InputError("phones: a word has no canonical ones")
    if utterance.scores and utterance.scores.keys() != {*prompts.SCORES}:
        raise cli.InputError(f"scores {', '.join(utterance.scores)}: they must be {', '.join(prompts.SCORES)}")
    low, high = prompts.SCORE_RANGE
    for name, score in (utterance.scores or {}).items():
        if type(score) is not int or not low <= score <= high:
            raise cli.InputError(f"{name} {score!r:.40}: a whole number from {low} to {high}")


Reader = Iterator[tuple[str, Callable[[], Utterance]]]


def load_reader(path: Path) -> Callable[[Path, str], Reader]:
    """The function `read(folder, split)` of a Python file.

    It yields (id, make) of each utterance; make() returns the Utterance, or raises InputError with what is wrong with
    this one. The file is run, so the command line alone may name it: see `reader_again`.
    """
    if not (path.is_file() and (spec := importlib.util.spec_from_file_location(path.stem, path))):
        raise cli.InputError(f"--data-reader {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise cli.InputError(f"--data-reader {path} cannot be run: {type(error).__name__}: {error}") from error
    if not hasattr(module, "read"):
        raise cli.InputError(f"--data-reader {path} has no function read(folder, split)")
    return module.read


def reader_again(given: Path | None, trained: str | Path | None) -> Path | None:
    """The reader that the command line names. One that a settings file names is not run: it may come from anywhere."""
    if trained and not given:
        raise cli.InputError(f"the corpus was read by {trained}, which would be run: give --data-reader {trained}")
    return given


def read_folder(root: Path, split: str) -> Reader:
    """The public release, in the order of its list of the split."""
    records, speakers = _read_records(root / "resource" / "scores.json"), _read_list(root / split / "utt2spk")
    for id, path in _read_list(root / split / "wav.scp").items():
        recording = partial(files.read_bytes, str(root / path))
        yield id, partial(_utterance, id, recording, records.get(id), speakers.get(id))


def _read_records(path):
    """{id: record} of scores.json."""
    try:
        records = json.loads(files.read_text(path), object_pairs_hook=partial(_once, path))
    except (ValueError, RecursionError) as error:
        raise cli.InputError(f"{path} is not JSON: {cli.first_line(error)}") from error
    return files.check(dict[str, Any], records, path)


def _read_list(path):
    """A Kaldi list, one `key value` a line, as a dict."""
    lines = [line.split(maxsplit=1) for line in files.read_text(path).rstrip("\n").split("\n")]
    if wrong := [number for number, fields in enumerate(lines, 1) if len(fields) != 2]:
        raise cli.InputError(f"line {wrong[0]} of {path} is not a key and a value")
    return _once(path, [(key, value.strip()) for key, value in lines])


def _once(path, pairs):
    """Pairs as a dict, in which a repeated key would hide the first."""
    if len(fields := dict(pairs)) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise cli.InputError(f"{path} has {repeated!r:.80} twice: remove one")
    return fields


def read_hub(folder: Path, split: str) -> Reader:
    """The hub's data set. Audio stays encoded: soundfile decodes it, not torchcodec."""
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(str(folder), split=split)
    except (OSError, ValueError) as error:
        raise cli.InputError(
            f"corpus {folder} has no split {split!r} that can be read: {cli.first_line(error)}"
        ) from error
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    for i, record in enumerate(dataset):
        # The hub has no id column: the name of the sound file is the release's utterance id.
        id = Path(record.pop("audio")["path"] or f"{split}-{i:05d}").stem
        yield id, partial(_utterance, id, lambda i=i: dataset[i]["audio"]["bytes"], record, record["speaker"])


def _utterance(id, recording, record, speaker):
    """An utterance of speechocean762, checked."""
    if record is None:
        raise cli.InputError("no entry in resource/scores.json")
    if speaker is None:
        raise cli.InputError("no speaker")
    record = files.check(Record, record, "its record")
    scores = {name: getattr(record, name) for name in prompts.SCORES}
    scores = {name: int(score) if score.is_integer() else score for name, score in scores.items()}  # 8 is also 8.0
    words = tuple(map(_word, record.words))
    return Utterance(id, recording, read_length(recording), record.text.strip(), scores, words, speaker)


def read_length(recording: Callable[[], bytes]) -> int:
    """How many samples a recording has at SAMPLE_RATE. Raises InputError for what must not be trained on."""
    audio = sound.read_audio(recording)
    sound.check_level(audio)
    return len(audio)


class Mispronunciation(files.Shape):
    index: Annotated[int, Field(ge=0)]  # of the canonical phone within its word
    heard: str = Field(alias="pronounced-phone")


class RatedWord(files.Shape):
    text: str
    phones: list[str] | str
    mispronunciations: list[Mispronunciation]


class Record(files.Shape):  # of an utterance, in scores.json and on the hub
    text: str
    accuracy: float
    fluency: float
    prosodic: float
    total: float
    words: Annotated[list[RatedWord], Field(min_length=1)]


def _word(record):
    """One word with its realised phones: each mispronunciation replaces the phone at its index within the word.

    Stress digits are gone; `<DEL>` means nothing was heard; `<unk>` and starred phones (close to the phone, but not it)
    are labels of their own. Raises InputError for an index that is outside, or that has two labels.
    """
    phones = record.phones.split() if isinstance(record.phones, str) else record.phones
    labels = {label.index: label.heard for label in record.mispronunciations}
    if len(labels) < len(record.mispronunciations) or max(labels, default=0) >= len(phones):
        indices = sorted(label.index for label in record.mispronunciations)
        raise cli.InputError(
            f"word {record.text!r:.40}: mispronunciation index twice, or outside its {len(phones)} phones: "
            f"{indices!r:.80}"
        )
    heard = [labels.get(index, phone) for index, phone in enumerate(phones)]
    canonical, heard = (tuple(re.sub(r"\d", "", phone) for phone in part) for part in (phones, heard))  # stress
    return Word(record.text.strip(), canonical, tuple(phone for phone in heard if phone != "<DEL>"), len(labels))


def log_mel(utterance: Utterance, extractor: Callable[..., Mapping[str, Sequence[ArrayLike]]]) -> ArrayLike:
    """Log-mel features (F, 80) of one utterance, by the model's own feature extractor.

    One recording at a time: the extractor's batched path fails on some sets of lengths.
    """
    features = extractor(sound.read_audio(utterance.recording), sampling_rate=SAMPLE_RATE)
    return features["audio_input_features"][0]


def describe(utterances: Sequence[Utterance]) -> str:
    """One line about a list of utterances; the phone inventory tells which version of the labels was read."""
    inventory = Counter(phone for utterance in utterances for phone in utterance.heard)
    canonical = sum(len(utterance.canonical) for utterance in utterances)
    mispronounced = sum(word.mispronounced for utterance in utterances for word in utterance.words)
    hours = sum(utterance.samples for utterance in utterances) / SAMPLE_RATE / 3600
    return (
        f"{len(utterances):,} utterances of {len({u.speaker for u in utterances})} speakers, {hours:.2f} hours; "
        f"{canonical:,} canonical phones, {mispronounced:,} mispronounced; "
        f"{len(inventory)} phone labels heard: {' '.join(sorted(inventory))}"
    )


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """A digest of what was read, labels included: equal for the same corpus, wherever it lies."""
    digest = hashlib.sha256()
    for u in utterances:
        words = [(w.text, w.canonical, w.heard) for w in u.words]
        scores = sorted((u.scores or {}).items())
        digest.update(repr((u.id, u.samples, u.text, scores, words, u.speaker)).encode())
    return digest.hexdigest()


def hold_out_speakers(
    utterances: Sequence[Utterance], share: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances to train on and to validate on. No speaker is in both, as none is in the corpus' own two parts.

    share: of the speakers, drawn at random, at least one. Raises InputError when none would be left to train on.
    """
    speakers = sorted({utterance.speaker for utterance in utterances})
    count = max(1, round(share * len(speakers)))
    if count >= len(speakers):
        raise cli.InputError(
            f"--validation {share} of {len(speakers)} speakers leaves none to train on: "
            f"use more utterances or a smaller share"
        )
    held_out = set(np.random.default_rng(seed).choice(speakers, count, replace=False))
    return [u for u in utterances if u.speaker not in held_out], [u for u in utterances if u.speaker in held_out]


def reference(utterance: Utterance, task: str) -> dict:
    """What an answer is scored against."""
    if task == "APA":
        return utterance.scores
    return {"word_transcript": utterance.text, "canonical": utterance.canonical, "heard": utterance.heard}


# ----------------------------------------------------------------------------------------------------------------------
# Examples and batches


class Tokenizer(Protocol):
    """What of transformers' tokenizers is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    utterance: Utterance
    task: str
    prompt_ids: list[int]  # with one audio placeholder for each audio embedding
    answer_ids: list[int]  # ends with <|end|>

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def make_examples(
    utterances: Sequence[Utterance], tokenizer: Tokenizer, audio_id: int, longest: int = cli.LARGEST
) -> list[Example]:
    """The examples of a corpus, one an utterance and task (paper 4.2).

    Raises InputError where one has more than `longest` tokens: nothing is cut.
    """
    examples = []
    for utterance in utterances:
        for task in utterance.tasks:
            apa = task == "APA"
            answer = (
                prompts.apa_target(utterance.scores) if apa else prompts.mdd_target(utterance.text, utterance.heard)
            )
            answer_ids = tokenizer.encode(answer + prompts.END, add_special_tokens=False)
            examples.append(Example(utterance, task, encode_prompt(utterance, task, tokenizer, audio_id), answer_ids))
    if long := [example for example in examples if len(example) > longest]:
        worst = max(long, key=len)
        raise cli.InputError(
            f"{len(long)} examples are longer than --max-tokens {longest:,}, such as {worst.utterance.id} "
            f"({worst.task}) with {len(worst):,}: raise it, or take them out of the corpus"
        )
    return examples


def encode_prompt(
    utterance: Utterance, task: str, tokenizer: Tokenizer, audio_id: int, control_token: bool = True
) -> list[int]:
    """Token ids of a prompt, up to and including <|assistant|>; the audio placeholder repeated for every embedding."""
    before, after = _encode_around_audio(tokenizer, task, control_token)
    return before + [audio_id] * utterance.audio_tokens + after


@cache  # the same for every utterance, and the prompts are long
def _encode_around_audio(tokenizer, task, control_token):
    parts = prompts.build_prompt(task, control_token).split(prompts.AUDIO)
    return [tokenizer.encode(part, add_special_tokens=False) for part in parts]


@cache
def encode_score_slots(tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """An APA answer as token ids around its scores: what stands before each of the four, and the ids of values 0-10.

    Raises InputError when the tokenizer does not write each value as one token of its own.
    """
    low, high = prompts.SCORE_RANGE
    answers = [
        tokenizer.encode(prompts.apa_target(dict.fromkeys(prompts.SCORES, value)), add_special_tokens=False)
        for value in range(low, high + 1)
    ]
    columns = [*zip(*answers)]  # the tokens at each position
    slots = [i for i, column in enumerate(columns) if len({*column}) > 1]
    values = columns[slots[0]]
    alike = len({*map(len, answers)}) == 1 and [columns[i] for i in slots] == [values] * len(prompts.SCORES)
    if not alike or len({*values}) < len(values):
        raise cli.InputError(
            f"this tokenizer does not write each score from {low} to {high} as one token: use --scoring greedy"
        )
    starts = [0, *(slot + 1 for slot in slots)]
    return [answers[0][start:slot] for start, slot in zip(starts, slots)], [*values]


@dataclass
class MicroBatch:
    """Padded examples, as the model takes them."""

    input_ids: np.ndarray  # (B, T)
    labels: np.ndarray  # (B, T); IGNORE where there is no loss
    utterances: list[Utterance]  # of each row
    tokens: int  # without padding


def collate(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """Examples as one MicroBatch, padded on the right, with the labels masked.

    A row's positions are then those it has alone, and causal attention needs no mask: what comes after a row's end is
    seen by nothing in it. Labels are built from lengths, not guessed from ids: IGNORE on the prompt up to and including
    <|assistant|> and on padding; the answer and its <|end|> are supervised.
    """
    longest = max(len(example) for example in examples)
    input_ids = np.full((len(examples), longest), pad_id, dtype=np.int64)  # (B, T)
    labels = np.full_like(input_ids, IGNORE)  # (B, T)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example)
        input_ids[row, :end] = example.prompt_ids + example.answer_ids
        labels[row, start:end] = example.answer_ids
    return MicroBatch(input_ids, labels, [example.utterance for example in examples], sum(map(len, examples)))


def epoch_steps(examples: int, step_size: int, seed: int, epoch: int) -> np.ndarray:
    """The steps of one epoch: indices of `step_size` of the `examples`, drawn at random without replacement.

    The order depends on seed and epoch alone. What does not fill a step is left out of this epoch, a different
    remainder each time; a corpus smaller than one step is one step. Returns (steps, step_size).
    """
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    step_size = min(step_size, examples)
    return order[: examples // step_size * step_size].reshape(-1, step_size)


def micro_batches(step: Sequence[Example], size: int, rank: int = 0, processes: int = 1) -> list[list[Example]]:
    """One process' share of a step, cut into micro-batches of similar length, longest first.

    Little padding, memory peaks at once, and every process gets as much as the others. The gradient of a step does not
    depend on the cut, so this changes nothing but the time.
    """
    ordered = sorted(step, key=len, reverse=True)[rank::processes]
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
