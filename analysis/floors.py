"""What does a number mean beside one that needs no pronunciation?

    python -m analysis.floors out/predictions.jsonl                      # the corpus that was evaluated
    python -m analysis.floors answers.jsonl --data speechocean762/       # by default speechocean762, which is fetched

Prints the tables of evaluate.py for saved predictions with three floors, and needs no model. "canonical phones"
writes what should have been said. "writes nothing" flags every phone as mispronounced. "pauses and energy" is fitted on
the train part of the corpus: least squares on eleven numbers of the waveform, none of which knows a phone or a word. On
speechocean762 its correlations with the human scores are 0.57 (accuracy), 0.68 (fluency), 0.65 (prosodic) and 0.59
(total); what a model hears of pronunciation is what it has above this row.

Shapes: S samples, F features, U utterances, K scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tyro.conf import Positional

import data
import evaluate
import prompts
from support import answers, cli, sound

# Frames are those of the model's feature extractor: data.FRAME (25 ms) every data.HOP (10 ms).
# Below -100 dBFS a 16-bit recording holds nothing but its own rounding; digital silence gets this level, not -inf.
QUIETEST = -100.0  # dBFS
LOUD = 95  # percentile of frame levels that stands for the recording's speech level; the maximum may be a click
# Our choice, by cross-validation over the train split's speakers. Little depends on it: the mean correlation is 0.66,
# and at least 0.64 with 15 to 25 dB and 0.2 to 0.5 s.
SILENCE = 20.0  # dB below the speech level
SHORTEST_PAUSE = 0.4  # seconds
LEVELS = (5, 25, 50, 75, 95)  # percentiles of frame levels: noise floor, dynamics, loudness

NOTE = (
    "pauses and energy: a linear fit that knows no phones; a model that is not above it has learnt nothing about "
    "pronunciation."
)
FEATURES = (
    "duration",  # seconds
    "speech_span",  # seconds from the start of the first speech frame to the end of the last
    "silence_share",  # of all frames, those before and after speech included
    "pauses",  # count, between speech only
    "longest_pause",  # seconds
    "pause_sum",  # seconds
    *(f"level_{percentile}" for percentile in LEVELS),  # dBFS
)


@dataclass(kw_only=True)
class Settings(evaluate.CorpusSettings):
    predictions: Positional[Path]  # predictions.jsonl of evaluate.py


# ----------------------------------------------------------------------------------------------------------------------
# The fit


def waveform_features(audio: np.ndarray) -> np.ndarray:
    """Duration, silence, pauses and levels of one recording.

    audio: (S,) float32 at 16 kHz, at least one frame. Returns (F,) float64, finite, in the order of FEATURES.
    """
    levels = frame_levels(audio)  # (frames,)
    speech = np.flatnonzero(levels >= np.percentile(levels, LOUD) - SILENCE)  # indices, never empty
    gaps = np.diff(speech) - 1  # silent frames between neighbouring speech frames
    pauses = _seconds(gaps[gaps > 0])
    pauses = pauses[pauses >= SHORTEST_PAUSE]
    return np.array(
        [
            len(audio) / data.SAMPLE_RATE,
            _seconds(speech[-1] - speech[0] + 1),
            1 - len(speech) / len(levels),
            len(pauses),
            pauses.max(initial=0.0),
            pauses.sum(),
            *np.percentile(levels, LEVELS),
        ]
    )


def frame_levels(audio: np.ndarray) -> np.ndarray:
    """The level of every frame in dBFS (0: a square wave at full scale). audio: (S,) -> (frames,) float64."""
    frames = np.lib.stride_tricks.sliding_window_view(np.square(audio, dtype=np.float64), data.FRAME)[:: data.HOP]
    return 10 * np.log10(np.maximum(frames.mean(axis=1), 10 ** (QUIETEST / 10)))


def _seconds(frames):
    """How long a run of so many overlapping frames is."""
    return ((frames - 1) * data.HOP + data.FRAME) / data.SAMPLE_RATE


def pauses_and_energy(train: Sequence[data.Utterance], test: Sequence[data.Utterance]) -> dict[str, dict[str, float]]:
    """Scores of the test utterances, by least squares on the human scores of the train utterances.

    Their recordings are read one at a time.
    Returns {test utterance id: {score name: float from 0 to 10}}.
    """
    human = np.array([[utterance.scores[name] for name in prompts.SCORES] for utterance in train])  # (U, K)
    weights, *_ = np.linalg.lstsq(_design(train), human, rcond=None)  # (F + 1, K)
    fitted = np.clip(_design(test) @ weights, *prompts.SCORE_RANGE)  # (U, K)
    return {utterance.id: dict(zip(prompts.SCORES, row.tolist())) for utterance, row in zip(test, fitted, strict=True)}


def _design(utterances):
    """The features of every utterance and a 1 for the intercept: (U, F + 1)."""
    return np.array([[*waveform_features(sound.read_audio(utterance.recording)), 1.0] for utterance in utterances])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def find_utterances(records: list[dict], folder: Path, settings: evaluate.CorpusSettings) -> list[data.Utterance]:
    """The utterances that were evaluated. Raises InputError where the corpus has other ones, or other labels."""
    known = {utterance.id: utterance for utterance in evaluate.read_corpus(folder, settings)}
    for record in records:
        utterance = known.get(record["id"])
        if utterance is None or data.reference(utterance, record["task"]) != record["reference"]:
            raise cli.InputError(
                f"{ascii(record['id'])} ({record['task']}) is not in {settings.data} ({settings.split}), or has other "
                f"labels there: give --data, --data-revision and --split as they were"
            )
    return [known[id] for id in dict.fromkeys(record["id"] for record in records)]


def phone_floors(records: list[dict]) -> list[evaluate.Row]:
    """The rows of two "models" that do not listen; none where nobody was asked for phones."""
    asked = [record for record in records if record["task"] == "MDD"]
    silent = [record | {"output": prompts.mdd_target("", [])} for record in asked]
    if not asked:
        return []
    return [evaluate.copying_floor(asked), evaluate.make_row("writes nothing", silent)]


def score_floors(records: list[dict], train: list, test: list) -> list[evaluate.Row]:
    """The row of `pauses_and_energy`; none where nobody was asked for scores, or the train part has none."""
    asked = [record for record in records if record["task"] == "APA"]
    scored = [utterance for utterance in train if utterance.scores]
    if not (asked and scored):
        return []
    fitted = pauses_and_energy(scored, test)
    answered = [record | {"output": prompts.apa_target(fitted[record["id"]])} for record in asked]
    return [evaluate.make_row("pauses and energy", answered)]


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    records = answers.read(settings.predictions)
    evaluation = evaluate.saved_evaluation(settings.predictions)
    folder, settings = evaluate.choose_corpus(evaluation, settings)
    test = find_utterances(records, folder, settings)
    train = evaluate.read_corpus(folder, replace(settings, split="train"))
    rows = evaluate.rows_of(records, evaluation.label, evaluation.paper_row)
    evaluate.show(rows, phone_floors(records) + score_floors(records, train, test))
    cli.say(NOTE)


if __name__ == "__main__":
    cli.run_script("analysis.floors", main)
