"""Does a model listen? Its answers to silence, or to another speaker's recordings, instead of its own.

    python -m analysis.ablation silence --adapter out/
    python -m analysis.ablation swap --adapter out/ --epochs all --limit 500
    python -m analysis.compare out/ --against out/silence/      # how far the numbers drop, with intervals

A drop near zero means that it does not: it answers what is likely in the corpus. The answers go to a folder in that of
the evaluation, silence/ or swap/, as evaluate.py writes them.
"""

from dataclasses import dataclass, replace
from functools import partial
import io
from typing import Literal

import numpy as np
import soundfile
from tyro.conf import Fixed, Positional, Suppress

import data
import evaluate
from support import cli, sound


@dataclass(kw_only=True)
class Settings(evaluate.Settings):
    how: Positional[Literal["silence", "swap"]]  # silence of the same length, or the recording of another speaker
    predictions: Suppress[Fixed[None]] = None  # not a flag here: answers are generated


def other_audio(utterances: list[data.Utterance], how: str) -> list[data.Utterance]:
    """The utterances with other audio. Raises InputError where "swap" finds no other speaker."""
    if how == "silence":
        return [replace(u, recording=partial(silence, u.samples)) for u in utterances]
    if len({u.speaker for u in utterances}) < 2:
        raise cli.InputError("swap needs recordings of two speakers: use more utterances, or silence")
    others = []
    for i, utterance in enumerate(utterances):
        following = utterances[i + 1 :] + utterances[:i]
        others.append(next(other for other in following if other.speaker != utterance.speaker))
    return [replace(u, recording=o.recording, samples=o.samples) for u, o in zip(utterances, others)]


def silence(samples: int) -> bytes:
    """A sound file without sound."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples, dtype=np.float32), sound.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    chosen = evaluate.evaluations(settings, settings.output)
    others = [replace(e, label=f"{e.label}, {settings.how}", output=e.output / settings.how) for e in chosen]
    evaluate.evaluate(others, None, settings, partial(other_audio, how=settings.how))
    if cli.process_rank() == 0:
        for own, other in zip(chosen, others):
            cli.say(f"how far it drops: python -m analysis.compare {own.output} --against {other.output}")


if __name__ == "__main__":
    cli.run_script("analysis.ablation", main)
