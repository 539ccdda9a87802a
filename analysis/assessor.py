"""What does a model say of a recording? A function for programs; analysis.listen shows the same to people.

    from analysis.assessor import Assessor

    assess = Assessor("out/", pronunciations=["pronunciations.txt"])     # loads the model, once
    assess("my.wav", text="WE CALL IT BEAR")                             # a dict, see `result`
    assess(["a.wav", "b.wav"], text=["WE CALL", None])                   # a list of them, computed in batches

A recording is a path, or the content of a sound file as bytes: WAV, FLAC, MP3 or Ogg, up to 30 s.
"""

from dataclasses import dataclass, replace
from functools import partial
import io
import os
from pathlib import Path

import soundfile

from analysis import doubts, pronunciations
import data
import evaluate
import metrics
import prompts
from support import cli, files, sound

VERSION = 1  # of the dict; another one means that a field has another name or meaning
LONGEST = 30  # seconds; the corpus' longest utterance has 20.4 s, so the model was trained on nothing longer
BATCH = 16  # recordings answered together


@dataclass(frozen=True)
class Question:
    """A recording that can be scored, and what should have been said in it."""

    file: str
    utterance: data.Utterance  # without text, words and scores
    rate: int  # Hz of the file
    speech: float  # seconds
    text: str | None
    words: list | None  # of pronunciations.of_text, None without a text


class Assessor:
    """Answers questions about recordings with one model.

    adapter: run folder or epoch folder, None with base=True; pronunciations: files of analysis.pronunciations;
    settings: the other fields of evaluate.ModelSettings. Raises InputError for what cannot be loaded.
    """

    def __init__(self, adapter=None, pronunciations=(), **settings):
        self.lexicons = read_lexicons(pronunciations)
        settings = evaluate.ModelSettings(adapter=Path(adapter) if adapter else None, **settings)
        evaluation = evaluation_of(settings)
        settings = evaluate.choose_model(evaluation, settings)
        self.model, self.control_token = evaluate.load(evaluation, settings), evaluation.adapter is not None
        self.max_new_tokens = settings.max_new_tokens

    def __call__(self, recording, text=None):
        """The `result` of a recording, or of each in a list; `text` is a list then, or one text for all.

        Raises InputError for a recording or text that cannot be used; in a list its dict has "error" instead.
        """
        if not isinstance(recording, (list, tuple)):
            return self.answer([ask(recording, text, self.lexicons)])[0]
        texts = text if isinstance(text, (list, tuple)) else [text] * len(recording)
        return self.answer(ask_all(zip(recording, texts, strict=True), self.lexicons))

    def answer(self, questions):
        """The results of questions, in their order; an error of `ask_all` stays what it is."""
        results = list(questions)
        places = [i for i, question in enumerate(questions) if isinstance(question, Question)]
        places.sort(key=lambda i: questions[i].utterance.samples)
        for first in range(0, len(places), BATCH):
            part = places[first : first + BATCH]
            utterances = [replace(questions[i].utterance, id=str(i)) for i in part]
            lines = self.model.answer(
                utterances, ("expected",), self.max_new_tokens, self.control_token, tasks=prompts.TASKS
            )
            for i, scored, written in zip(part, lines[::2], lines[1::2], strict=True):  # in the order of prompts.TASKS
                results[i] = result(questions[i], scored["scores"], written["output"], written["truncated"])
        return results


def evaluation_of(settings):
    """The one model that evaluate.ModelSettings name. Raises InputError where that is not one."""
    if settings.epochs == "all" or (settings.adapter and settings.base):
        raise cli.InputError("one model listens: leave out --epochs all, and give --adapter or --base")
    (evaluation,) = evaluate.evaluations(settings)
    return evaluation


def read_lexicons(paths):
    return [*map(pronunciations.of_file, map(Path, paths)), pronunciations.of_dictionary()]


def ask(recording, text, lexicons):
    """A Question. Raises InputError, naming the file, for what cannot be read or says nothing about pronunciation."""
    file = _name(recording)
    if not isinstance(recording, bytes) and not os.path.isfile(recording):  # Path.is_file raises for a long name
        raise cli.InputError(f"{file} is not a file: give a recording (WAV, FLAC, MP3, Ogg)")
    content = recording if isinstance(recording, bytes) else files.read_bytes(recording)
    try:
        audio, rate = sound.decode_own(content, LONGEST)  # (S,)
    except cli.InputError as error:
        raise cli.InputError(f"{file}: {error}") from error
    wave = io.BytesIO()
    soundfile.write(wave, audio, sound.SAMPLE_RATE, format="WAV", subtype="FLOAT")
    read = partial(bytes, wave.getvalue())
    words = pronunciations.of_text(text, lexicons) if text is not None else None
    utterance = data.Utterance(file, read, len(audio), text="", scores=None, words=(), speaker="")
    return Question(file, utterance, rate, doubts.speech_seconds(audio), text, words)


def ask_all(pairs, lexicons):
    """A Question for each (recording, text), or {"file", "error"}."""
    questions = []
    for recording, text in pairs:
        try:
            questions.append(ask(recording, text, lexicons))
        except cli.InputError as error:
            questions.append({"version": VERSION, "file": _name(recording), "error": str(error)})
    return questions


def _name(recording):
    return "recording" if isinstance(recording, bytes) else str(recording)


def result(question, distributions, output, truncated):
    """Everything about one recording as plain values. docs/scores.md has the fields.

    distributions: {score name: 11 probabilities, of the scores 0 to 10}; output: the model's MDD answer; truncated:
    whether that came to its length limit.
    """
    scores = {}
    for name, distribution in distributions.items():
        expected, mode = metrics.expectation(distribution), metrics.likeliest(distribution)
        scores[name] = {"expected": expected, "mode": mode, "distribution": list(distribution)}
    transcript = prompts.parse_output("MDD", output)
    phones = metrics.normalise_phones(transcript["phoneme_transcript"]) if transcript else None
    if phones is not None and not doubts.known_phones(phones):
        phones = None
    meant = pronunciations.meant(question.words, phones) if question.words and phones is not None else None
    accuracy = scores["accuracy"]["expected"]
    warnings = doubts.find(question.speech, question.rate, truncated, phones, question.words, meant, accuracy)
    codes = {warning["code"] for warning in warnings}
    nothing_heard = phones is None or codes.intersection(doubts.NOTHING_HEARD)
    return {
        "version": VERSION,
        "file": question.file,
        "text": question.text,
        "scores": None if codes.intersection(doubts.FORBIDS) else scores,
        "warnings": warnings,
        "heard": None if nothing_heard else {"words": transcript["word_transcript"], "phones": phones},
        "words": None if nothing_heard or not meant else [*map(_word, question.words, meant)],
    }


def _word(word, meant):
    """What became of one word; word: of pronunciations.of_text; meant: its part of pronunciations.meant."""
    canonical, marks = meant
    kinds = [kind for kind, _, _ in marks]
    share = kinds.count("same") / len(canonical)
    if {*kinds} == {"same"}:
        error = "None"
    elif {*kinds} == {"missing"}:
        error = "Omission"
    else:
        error = "Insertion" if share == 1 else "Mispronunciation"
    phones = [{"canonical": said, "heard": heard} for _, said, heard in marks]
    return {"word": word[0], "ErrorType": error, "share_of_phones_right": share, "phones": phones}
