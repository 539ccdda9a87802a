"""Does a model listen? Its numbers on its own recordings less those on silence, or on another speaker's recordings.

    python -m analysis.ablation silence --adapter out/
    python -m analysis.ablation swap --adapter out/ --epochs all --limit 500

A drop near zero means that it does not: it answers what is likely in the corpus. The table is that of analysis.compare.
What evaluate.py has written of the own audio is read again; answers to the other audio go to a folder in that one,
silence/ or swap/.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
import io
import json
from typing import Literal

import numpy as np
import soundfile
from tyro.conf import Fixed, Positional, Suppress

from analysis import compare
import data
import evaluate
from support import answers, cli, files, sound
from support.later import when_used

with when_used():
    from support import processes

MARK = "ablation.json"


@dataclass(kw_only=True)
class Settings(evaluate.Settings):
    how: Positional[Literal["silence", "swap"]]  # silence of the same length, or the recording of another speaker
    predictions: Suppress[Fixed[None]] = None  # not a flag here: evaluate.py's are found beside the adapter


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


def find_own(evaluation: evaluate.Evaluation, utterances: list[data.Utterance], settings: Settings) -> list[dict]:
    """The records of the own audio, made by the same model and settings. Raises InputError where there are none."""
    made_with = evaluate.made_with(evaluation, utterances, settings)
    found = answers.find(evaluation.output, evaluate.asked_of(utterances), made_with)
    if found is None:
        raise cli.InputError(
            f"{evaluation.output} holds no answers of {evaluation.label} to the own audio with these settings: "
            "run evaluate.py with them first"
        )
    return found


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    chosen = evaluate.evaluations(settings, settings.output)
    others = [replace(e, label=f"{e.label}, {settings.how}", output=e.output / settings.how) for e in chosen]
    with ExitStack() as owned:
        for other in others:
            written = [MARK, *answers.GENERATED, *answers.SCORED]
            owned.enter_context(files.own(other.output, "analysis.ablation", MARK, written))
            with files.whole(other.output / MARK) as temporary:
                mark = {"written_by": files.signature("analysis.ablation"), "audio": settings.how}
                temporary.write_text(json.dumps(mark) + "\n")
        processes.start()
        settings = evaluate.choose_model(chosen[-1], settings)
        utterances = evaluate.read_corpus(chosen[-1], settings)
        changed = other_audio(utterances, settings.how)
        own = [find_own(evaluation, utterances, settings) for evaluation in chosen]
        for mine, evaluation, other in zip(own, chosen, others):
            records = evaluate.generate(other, changed, settings)
            if cli.process_rank() == 0:
                evaluate.score(records, other.label, other.paper_row, other.output)
                caption = f"{evaluation.label} on its own audio (A) and on {settings.how} (B), {other.output}"
                cli.show_table(caption, *compare.differences([[mine], [records]]))
        processes.end()


if __name__ == "__main__":
    cli.run_script("analysis.ablation", main)
