"""What does a model say of a recording? A function for programs; analysis.listen shows the same to people.

    from analysis.assessor import Assessor

    assess = Assessor("out/", pronunciations=["pronunciations.txt"])     # loads the model, once
    assess("my.wav", text="WE CALL IT BEAR")                             # a Result
    assess(["a.wav", "b.m4a"], text=["WE CALL", None])                   # a list of them, computed in batches

A recording is a path, or the content of a sound file as bytes: whatever FFmpeg decodes, up to 30 s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
import io
import os
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import soundfile

from analysis.pronunciations import PHONES, Lexicon, Words, ipa, meant, of_dictionary, of_file, of_text
import data
import evaluate
import metrics
import prompts
from support import cli, sound
from support import run as runs
from support.later import when_used

with when_used():
    import silero_vad
    import torch

    import model as models

VERSION = 2  # of the result; another one means that a field has another name or meaning
LONGEST = 30  # seconds; the corpus' longest utterance has 20.4 s, so the model was trained on nothing longer
BATCH = 16  # recordings answered together
SHOWN = 5  # runs that are suggested
# s of silence that stay before and after speech: of speechocean762's recordings 95 % have no more, by silero-vad
MARGINS = (0.8, 0.7)
# Only what is this much quieter than speech is silence (20 dB): silero-vad misses words of 2 in 100 recordings.
QUIET, WINDOW = 0.1, sound.SAMPLE_RATE // 10  # root mean square of 0.1 s

# ----------------------------------------------------------------------------------------------------------------------
# The result; `dataclasses.asdict` gives the JSON of analysis.listen and analysis.serve. docs/scores.md has the fields

Recording = str | os.PathLike | bytes


@dataclass(frozen=True)
class Score:
    expected: float  # 0-10
    mode: int  # the likeliest
    distribution: list[float]  # over the scores 0 to 10


@dataclass(frozen=True)
class Doubt:
    code: str  # docs/scores.md has them all
    message: str


@dataclass(frozen=True)
class Heard:
    words: str
    phones: list[str]
    ipa: list[str | None]  # the same phones; None: <unk>


@dataclass(frozen=True)
class Phone:
    canonical: str | None  # None: it was added
    heard: str | None  # None: it is missing
    canonical_ipa: str | None
    heard_ipa: str | None  # None: it is missing, or <unk>


@dataclass(frozen=True)
class Word:
    word: str
    ErrorType: Literal["None", "Mispronunciation", "Omission", "Insertion"]  # the name that services have for it
    accuracy: float  # share of its phones that were said right, 0-1; counted, not scored
    phones: list[Phone]


@dataclass(frozen=True)
class Result:
    file: str
    text: str | None
    trimmed: tuple[float, float]  # seconds of silence that were left out before and after speech
    scores: dict[str, Score] | None  # of each of prompts.SCORES; None where a warning forbids them
    warnings: list[Doubt]
    heard: Heard | None  # None where it says nothing
    words: list[Word] | None  # of the text
    completeness: float | None  # share of the text's words that were said, 0-1; counted, not scored
    version: int = VERSION


@dataclass(frozen=True)
class Refusal:
    """In the place of a Result, for a recording or text that cannot be used."""

    file: str
    error: str
    version: int = VERSION


# ----------------------------------------------------------------------------------------------------------------------
# Asking


@dataclass(frozen=True)
class Question:
    """A recording that can be scored, and what should have been said in it."""

    utterance: data.Utterance  # its id is the file's name; without text, words and scores
    rate: int  # Hz of the file
    speech: float  # seconds
    trimmed: tuple[float, float]  # seconds
    text: str | None
    words: Words | None  # None without a text


class Assessor:
    """Answers questions about recordings with one model, which is loaded for the first that can be answered.

    adapter: run folder or epoch folder, or all settings of a model; pronunciations: files of analysis.pronunciations.
    Raises InputError for what cannot be loaded.
    """

    def __init__(
        self,
        adapter: str | os.PathLike | evaluate.ModelSettings,
        pronunciations: Iterable[str | os.PathLike] = (),
    ) -> None:
        own = isinstance(adapter, evaluate.ModelSettings)
        self.settings = adapter if own else evaluate.ModelSettings(adapter=Path(adapter))
        self.evaluation = evaluation_of(self.settings)
        self.lexicons = [*map(of_file, map(Path, pronunciations)), of_dictionary()]

    @cached_property
    def model(self) -> "models.SpeechModel":
        return evaluate.load(self.evaluation, *evaluate.choose_model(self.evaluation, self.settings))

    def __call__(
        self, recording: Recording | Sequence[Recording], text: str | Sequence[str | None] | None = None
    ) -> Result | list[Result | Refusal]:
        """The Result of a recording, or of each in a list; `text` is a list then, or one text for all.

        Raises InputError for a recording or text that cannot be used; a list has a Refusal in its place.
        """
        if not isinstance(recording, (list, tuple)):
            return self.answer([ask(recording, text, self.lexicons)])[0]
        texts = text if isinstance(text, (list, tuple)) else [text] * len(recording)
        questions = []
        for one, said in zip(recording, texts, strict=True):
            try:
                questions.append(ask(one, said, self.lexicons))
            except cli.InputError as error:
                questions.append(Refusal(_name(one), str(error)))
        return self.answer(questions)

    def answer(self, questions: Sequence[Question | Refusal]) -> list[Result | Refusal]:
        """The results of questions, in their order; a refusal stays what it is."""
        results = list(questions)
        places = [i for i, question in enumerate(questions) if isinstance(question, Question)]
        places.sort(key=lambda i: questions[i].utterance.samples)
        for first in range(0, len(places), BATCH):
            part = places[first : first + BATCH]
            utterances = [questions[i].utterance for i in part]
            how = ("expected",), self.settings.max_new_tokens, self.evaluation.adapter is not None, prompts.TASKS
            lines = models.answer(self.model, utterances, *how)
            for i, scored, written in zip(part, lines[::2], lines[1::2], strict=True):  # in the order of prompts.TASKS
                results[i] = result(questions[i], scored["scores"], written["output"], written["truncated"])
        return results


def evaluation_of(settings: evaluate.ModelSettings) -> evaluate.Evaluation:
    """The one model that the settings name. Raises InputError where that is not one, naming those that are here."""
    if not (settings.adapter or settings.base):
        marks = [mark for runs_in in ("*", "*/*") for mark in Path().glob(f"{runs_in}/epoch-*/{runs.MARK}")]
        here = sorted({f"--adapter {mark.parent.parent}" for mark in marks})
        trained = f"here are {', '.join(here[:SHOWN])}" if here else "train.py writes one for --adapter"
        raise cli.InputError(f"no model is named: {trained}; --base takes the unmodified one")
    if settings.epochs == "all" or (settings.adapter and settings.base):
        raise cli.InputError("one model listens: leave out --epochs all, and give --adapter or --base")
    (evaluation,) = evaluate.evaluations(settings)
    return evaluation


def ask(recording: Recording, text: str | None, lexicons: Sequence[Lexicon]) -> Question:
    """A Question. Raises InputError, naming the file, for what cannot be read or says nothing about pronunciation.

    May be called by several threads at once.
    """
    words = of_text(text, lexicons) if text is not None else None
    audio, rate = sound.read_own(recording, LONGEST)  # (S,)
    parts = find_speech(audio)
    start, end = usual_margins(audio, parts)
    trimmed = start / sound.SAMPLE_RATE, (len(audio) - end) / sound.SAMPLE_RATE
    audio, speech = audio[start:end], sum(end - start for start, end in parts) / sound.SAMPLE_RATE
    wave = io.BytesIO()
    soundfile.write(wave, audio, sound.SAMPLE_RATE, format="WAV", subtype="FLOAT")
    read = partial(bytes, wave.getvalue())
    utterance = data.Utterance(_name(recording), read, len(audio), text="", scores=None, words=(), speaker="")
    return Question(utterance, rate, speech, trimmed, text, words)


def _name(recording):
    return "recording" if isinstance(recording, bytes) else str(recording)


@cache
def _detector():
    threads = torch.get_num_threads()  # the package, which is imported below, sets it to 1
    model = silero_vad.load_silero_vad()
    torch.set_num_threads(threads)
    return model


_detecting = Lock()  # the detector keeps a state while it hears


def find_speech(audio: np.ndarray) -> list[tuple[int, int]]:
    """Where a recording (S,) has speech, (first sample, end), by silero-vad.

    3 s of white or pink noise, a tone or a chord have none, of mains hum 0.7 s; of 500 utterances of the test part each
    has 1.08 s or more. webrtcvad takes white noise for speech. The weights are in the package, which needs torch alone.
    """
    with _detecting:
        detector = _detector()
        found = silero_vad.get_speech_timestamps(torch.as_tensor(audio), detector, sampling_rate=sound.SAMPLE_RATE)
    return [(part["start"], part["end"]) for part in found]


def usual_margins(audio: np.ndarray, parts: list[tuple[int, int]]) -> tuple[int, int]:
    """First sample and end of a recording (S,) with no more silence at its edges than the corpus has."""
    if not parts:
        return 0, len(audio)
    before, after = (round(seconds * sound.SAMPLE_RATE) for seconds in MARGINS)
    start, end = max(0, parts[0][0] - before), min(len(audio), parts[-1][1] + after)
    limit = QUIET * np.concatenate([audio[first:last] for first, last in parts]).std()
    loudest = [
        max((edge[i : i + WINDOW].std() for i in range(0, len(edge), WINDOW)), default=0.0)
        for edge in (audio[:start], audio[end:])
    ]
    return start if loudest[0] < limit else 0, end if loudest[1] < limit else len(audio)


# ----------------------------------------------------------------------------------------------------------------------
# Answering


def result(question: Question, distributions: dict[str, Sequence[float]], output: str, truncated: bool) -> Result:
    """Everything about one recording.

    distributions: {score name: 11 probabilities, of the scores 0 to 10}; output: the model's MDD answer; truncated:
    whether that came to its length limit.
    """
    scores = {name: Score(metrics.expectation(d), int(np.argmax(d)), list(d)) for name, d in distributions.items()}
    transcript = prompts.parse_output("MDD", output)
    phones = metrics.normalise_phones(transcript["phoneme_transcript"]) if transcript else None
    if phones is not None and any(phone.removesuffix("*") not in HEARD for phone in phones):
        phones = None
    words = None
    if question.words and phones is not None:
        pairs = meant(question.words, phones)
        words = [_word(word, own) for (word, _), own in zip(question.words, pairs, strict=True)]
    warnings = find_doubts(question, truncated, phones, words, scores["accuracy"].expected)
    codes = {warning.code for warning in warnings}
    nothing_heard = phones is None or codes.intersection(NOTHING_HEARD)
    words = None if nothing_heard else words
    return Result(
        file=question.utterance.id,
        text=question.text,
        trimmed=question.trimmed,
        scores=None if codes.intersection(FORBIDS) else scores,
        warnings=warnings,
        heard=None if nothing_heard else Heard(transcript["word_transcript"], phones, [*map(ipa, phones)]),
        words=words,
        completeness=words and sum(word.ErrorType != "Omission" for word in words) / len(words),
    )


def _word(word, pairs):
    """What became of one word; pairs: its part of pronunciations.meant."""
    kinds = [metrics.kind_of(*pair) for pair in pairs]
    share = kinds.count("same") / (len(kinds) - kinds.count("added"))
    if {*kinds} == {"same"}:
        error = "None"
    elif {*kinds} == {"missing"}:
        error = "Omission"
    else:
        error = "Insertion" if share == 1 else "Mispronunciation"
    return Word(word, error, share, [Phone(*pair, *map(ipa, pair)) for pair in pairs])


# ----------------------------------------------------------------------------------------------------------------------
# When an answer is not to be believed. A model scores noise, too; these are the signs that it did. The limits come from
# speechocean762's test part, with the phones that raters heard; beside each stands what was measured

HEARD = {*PHONES, "<unk>"}  # of the corpus' labels; a star may follow
FORBIDS = ("no_speech", "too_short", "another_sentence")  # scores
NOTHING_HEARD = ("no_speech", "too_short")  # so what the model wrote says nothing

FASTEST = 0.035  # s of speech a phone, half of the least in 500 utterances of the test part (0.070)
# Of the first 1,200 utterances less than 1 % have more marked phones against their own text, and all have against the
# text of another utterance.
OTHER_SENTENCE = 0.5  # share of phones
# Of these none of accuracy 8 or more has a larger share of marked phones than 0.27, and the one below 3 has 0.59.
HIGH, MANY = 8.0, 0.3
LOW = 3.0


def find_doubts(
    question: Question, truncated: bool, phones: list[str] | None, words: list[Word] | None, accuracy: float
) -> list[Doubt]:
    """The doubts about one answer.

    truncated: whether the transcript was cut off; phones: heard, None where the transcript cannot be read; words: of
    the text, None without text or phones; accuracy: the expected score.
    """
    count = sum(len(variants[0]) for _, variants in question.words) if question.words else len(phones or ())
    if not question.speech:
        return [Doubt("no_speech", "no speech is heard: check the microphone and record it again")]
    if question.speech < FASTEST * count:
        short = f"{question.speech:.2f} s of speech is too short for {count} phones: record the whole sentence"
        return [Doubt("too_short", short)]
    doubts = {
        "low_rate": question.rate < sound.SAMPLE_RATE
        and f"{question.rate:,} Hz lacks the upper band, which S, F and TH need: record at 16,000 Hz or more",
        "transcript_cut_off": truncated and "the transcript came to its length limit: what follows is missing",
        "transcript_unreadable": phones is None and "the model's transcript cannot be read",
    }
    if words:
        phones = [phone for word in words for phone in word.phones]
        share = sum(phone.canonical != phone.heard for phone in phones) / len(phones)
        if share > OTHER_SENTENCE:
            doubts["another_sentence"] = f"{share:.0%} of the phones are not the text's: was another sentence read?"
        elif accuracy >= HIGH and share > MANY or accuracy < LOW and share == 0:
            doubts["contradiction"] = f"accuracy {accuracy:.1f} and {share:.0%} of marked phones: believe neither"
    return [Doubt(code, message) for code, message in doubts.items() if message]
