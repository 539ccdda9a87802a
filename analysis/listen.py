"""What does a learner see of one recording?

    python -m analysis.listen my.wav --adapter out/ --text "WE CALL IT BEAR"

The recording is checked before a model scores it, and the answer is shown word by word. Of the pronunciations that
--pronunciations and the CMU dictionary have of a word, the one that is closest to what was heard counts:

    WE    W IY
    CALL  K AO>AA L       AO was heard as AA
    IT    -IH T           IH was not heard
    BEAR  B EH R +AH      AH was added
"""

from dataclasses import dataclass
from functools import partial
import json
import math
import os
from pathlib import Path
import sys

import numpy as np
from tyro.conf import Positional

from analysis import doubts, pronunciations
import data
import evaluate
import metrics
import prompts
from support import cli, files, sound

LONGEST = 30  # seconds; the corpus' longest utterance has 20.4 s, so the model was trained on nothing longer
# Below this a recording counts as silence. Our choice: the corpus' quietest utterance has -47.5 dBFS, and a muted
# microphone leaves only the noise of its converter.
SILENCE = -60.0  # dBFS, root mean square without the constant offset

BARS = " ▁▂▃▄▅▆▇█"  # from no probability to that of the most likely score
ANSI = {"same": "32", "substituted": "31", "missing": "31", "added": "33"}  # green, red, red, yellow
LEGEND = "TH>S: TH was heard as S   -T: T was not heard   +AH: AH was added"


@dataclass(kw_only=True)
class Settings(evaluate.ModelSettings):
    recordings: Positional[tuple[Path, ...]]  # WAV, FLAC, MP3 or Ogg, up to 30 s each
    text: str | None = None  # what should be said: its words are marked phone by phone
    pronunciations: tuple[Path, ...] = ()  # of words, before the CMU dictionary's: files of analysis.pronunciations
    json: bool = False  # print the results as JSON


def read_recording(path):
    """One sound file as a data.Utterance without text, words and scores.

    WAV, FLAC, MP3 or Ogg, of any rate, mono or stereo. Raises cli.InputError, naming the file, for what cannot be read
    and for what would be scored though it says nothing about pronunciation: silence, clipping, more than LONGEST.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise cli.InputError(f"{path} is not a file: give a recording (WAV, FLAC, MP3, Ogg)")
    audio = sound.read_sound_file(path, LONGEST)  # (S,)
    level = 20 * math.log10(max(np.std(audio, dtype=np.float64), 1e-6))  # dBFS; digital silence is -120
    if level < SILENCE:
        raise cli.InputError(
            f"{path}: level {level:.1f} dBFS is silence (limit {SILENCE:.0f} dBFS): "
            f"check the microphone and record it again"
        )
    return data.Utterance(
        id=path.name,
        recording=partial(files.read_bytes, path),
        samples=len(audio),
        text="",
        scores=None,
        words=(),
        speaker="",
    )


def result(file, distributions, transcript, words, speech, rate, truncated=False):
    """Everything about one recording as a dict of plain values, which --json prints and `show` writes out.

    file: its name; distributions: {score name: 11 probabilities, of the scores 0 to 10}; transcript: of
    prompts.parse_output("MDD", ...), None if that could not be parsed; words: of pronunciations.of_text, None without a
    text; speech: seconds; rate: Hz of the file; truncated: whether the transcript came to its length limit.
    "words" is absent if there is no text, or nothing heard to compare it with; "scores" is None where a warning forbids
    them, see doubts.
    """
    scores = {}
    for name, distribution in distributions.items():
        distribution = [float(probability) for probability in distribution]
        scores[name] = {
            "expected": metrics.expectation(distribution),
            "mode": metrics.likeliest(distribution),
            "distribution": distribution,
        }
    phones = metrics.normalise_phones(transcript["phoneme_transcript"]) if transcript else None
    if phones is not None and not doubts.known_phones(phones):
        phones = None
    meant = pronunciations.meant(words, phones) if words and phones is not None else None
    warnings = doubts.find(speech, rate, truncated, phones, words, meant, scores["accuracy"]["expected"])
    codes = {warning["code"] for warning in warnings}
    if codes.intersection(doubts.NOTHING_HEARD):
        phones = meant = None
    found = {
        "file": file,
        "scores": None if codes.intersection(doubts.FORBIDS) else scores,
        "warnings": warnings,
        "phones": phones,
        "word_transcript": None if phones is None else transcript["word_transcript"],
    }
    if meant:
        found["words"] = [
            {"word": word, "canonical": list(canonical), "marks": [list(mark) for mark in marks]}
            for (word, _), (canonical, marks) in zip(words, meant, strict=True)
        ]
    return found


def show(result, colour):
    """The dict of `result` as lines for a terminal; bars stand for the distribution of a score, where it has one.

    colour: whether marks get ANSI colours besides their signs.
    """
    low, high = prompts.SCORE_RANGE
    lines = [result["file"], *(f"warning: {warning['message']}" for warning in result["warnings"]), ""]
    if result["scores"]:
        lines.append(f"{'':10}  expected  most likely  {low}{high:>{high - low}}")
        for name, score in result["scores"].items():
            bars = _bars(score["distribution"])
            lines.append(f"{name:10}  {score['expected']:8.1f}  {score['mode']:11}  {bars}".rstrip())
    else:
        lines.append("no scores")
    if result["phones"] is None:
        return "\n".join(lines)
    lines += ["", f"words heard   {result['word_transcript']}", f"phones heard  {' '.join(result['phones'])}"]
    if "words" in result:
        width = max(len(word["word"]) for word in result["words"])
        marked = [(word["word"], [_mark(*mark, colour) for mark in word["marks"]]) for word in result["words"]]
        lines += ["", *(f"{word:{width}}  {' '.join(marks)}" for word, marks in marked), "", LEGEND]
    return "\n".join(lines)


def _bars(distribution):
    most = max(distribution)
    return "".join(BARS[round((len(BARS) - 1) * probability / most)] for probability in distribution)


def _mark(kind, canonical, heard, colour):
    text = {"same": canonical, "substituted": f"{canonical}>{heard}", "missing": f"-{canonical}", "added": f"+{heard}"}
    return f"\x1b[{ANSI[kind]}m{text[kind]}\x1b[0m" if colour else text[kind]


def main():
    settings = cli.parse(Settings, __doc__)
    if not settings.recordings:
        raise cli.InputError("nothing to listen to: give one or more sound files")
    if settings.epochs == "all" or (settings.adapter and settings.base):
        raise cli.InputError("one model listens: leave out --epochs all, and give --adapter or --base")
    (evaluation,) = evaluate.evaluations(settings)
    words = None
    if settings.text is not None:
        lexicons = [*map(pronunciations.of_file, settings.pronunciations), pronunciations.of_dictionary()]
        words = pronunciations.of_text(settings.text, lexicons)
    elif settings.pronunciations:
        raise cli.InputError("--pronunciations are of the words of --text: add it")
    utterances = [read_recording(path) for path in settings.recordings]
    settings = evaluate.choose_model(evaluation, settings)
    model, control_token = evaluate.load(evaluation, settings), evaluation.adapter is not None
    results = []
    for utterance in utterances:
        scored, written = model.answer(
            [utterance], ("expected",), settings.max_new_tokens, control_token, tasks=prompts.TASKS
        )
        transcript = prompts.parse_output("MDD", written["output"])
        speech = doubts.speech_seconds(sound.read_audio(utterance.recording))
        heard = speech, sound.rate_of(utterance.recording), written["truncated"]
        results.append(result(utterance.id, scored["scores"], transcript, words, *heard))
    if settings.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(show(result, sys.stdout.isatty()) for result in results))


if __name__ == "__main__":
    cli.run_script("analysis.listen", main)
