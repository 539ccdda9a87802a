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


@dataclass(kw_only=True)
class Settings(evaluate.CorpusSettings):
    predictions: Positional[Path]  # predictions.jsonl of evaluate.py


# ----------------------------------------------------------------------------------------------------------------------
# The fit


def waveform_features(audio: np.ndarray) -> dict[str, float]:
    """Duration, silence, pauses and levels of one recording, finite. audio: (S,) at 16 kHz, at least one frame."""
    levels = frame_levels(audio)  # (frames,)
    speech = np.flatnonzero(levels >= np.percentile(levels, LOUD) - SILENCE)  # indices, never empty
    gaps = np.diff(speech) - 1  # silent frames between neighbouring speech frames
    pauses = _seconds(gaps[gaps > 0])
    pauses = pauses[pauses >= SHORTEST_PAUSE]
    return {
        "duration": len(audio) / data.SAMPLE_RATE,  # seconds, as all that is no share, count or level
        "speech_span": _seconds(speech[-1] - speech[0] + 1),  # from its first frame to the end of its last
        "silence_share": 1 - len(speech) / len(levels),  # of all frames, those before and after speech included
        "pauses": len(pauses),  # between speech only
        "longest_pause": pauses.max(initial=0.0),
        "pause_sum": pauses.sum(),
        **{f"level_{part}": level for part, level in zip(LEVELS, np.percentile(levels, LEVELS))},  # dBFS
    }


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
    found = [waveform_features(sound.read_audio(utterance.recording)) for utterance in utterances]
    return np.array([[*features.values(), 1.0] for features in found])


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


def floor_rows(records: list[dict], train: list[data.Utterance], test: list[data.Utterance]) -> list[evaluate.Row]:
    """The rows of three "models" that know no phones, each where it was asked for what it answers.

    train, test: of the corpus; without a train part there is no fit.
    """
    transcribed, asked = ([record for record in records if record["task"] == task] for task in ("MDD", "APA"))
    scored, rows = [utterance for utterance in train if utterance.scores], []
    if transcribed:
        silent = [record | {"output": prompts.mdd_target("", [])} for record in transcribed]
        rows += [evaluate.copying_floor(transcribed), evaluate.make_row("writes nothing", silent)]
    if asked and scored:
        fitted = pauses_and_energy(scored, test)
        answered = [record | {"output": prompts.apa_target(fitted[record["id"]])} for record in asked]
        rows.append(evaluate.make_row("pauses and energy", answered))
    return rows


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    records = answers.read(settings.predictions)
    evaluation = evaluate.saved_evaluation(settings.predictions)
    folder, settings = evaluate.choose_corpus(evaluation, settings)
    test = find_utterances(records, folder, settings)
    train = evaluate.read_corpus(folder, replace(settings, split="train"))
    rows = evaluate.rows_of(records, evaluation.label, evaluation.paper_row)
    evaluate.show(rows, floor_rows(records, train, test))
    cli.say(NOTE)


if __name__ == "__main__":
    cli.run_script("analysis.floors", main)
