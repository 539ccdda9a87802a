"""Does a model listen? Its numbers on silence, or on another speaker's recordings, beside those on its own.

    python -m analysis.ablation silence --adapter out/
    python -m analysis.ablation swap --adapter out/ --epochs all --limit 500

A drop near zero means that it does not: it answers what is likely in the corpus. What evaluate.py has written beside
the adapter is used again; other answers go to folders in it, own/ and silence/ or swap/.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
import io
from typing import Literal

import numpy as np
import soundfile
from tyro.conf import Fixed, Positional, Suppress

import evaluate
import prompts
from support import answers, cli, files, screen, sound
from support.later import when_used

with when_used():
    from support import processes

DROPS = {f"{name}_pcc": name for name in prompts.SCORES} | {"wer": "WER", "per": "PER", "detection_f1": "found: F1"}


@dataclass(kw_only=True)
class Settings(evaluate.Settings):
    how: Positional[Literal["silence", "swap"]]  # silence of the same length, or the recording of another speaker
    predictions: Suppress[Fixed[None]] = None  # not a flag here: evaluate.py's are found beside the adapter


def other_audio(utterances, how):
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


def silence(samples):
    """A sound file without sound, as bytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples, dtype=np.float32), sound.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def ablate(evaluation, utterances, settings):
    """Rows of the tables for the own and for the other audio; none on ranks but 0."""
    folder, how = evaluation.output, settings.how
    other = replace(evaluation, label=f"{evaluation.label}, {how}", output=folder / how)
    changed = other_audio(utterances, how)
    own = answers.find(folder, utterances, evaluate.made_with(evaluation, utterances, settings))
    if own is None:
        with files.lock(folder / "own", "evaluate", "--output"):
            own = evaluate.generate(replace(evaluation, output=folder / "own"), utterances, settings)
    records = evaluate.generate(other, changed, settings)
    if cli.process_rank():
        return [], []
    own = evaluate.rows_of(own, evaluation.label, evaluation.paper_row)
    return own, evaluate.score(records, other.label, other.paper_row, other.output)


def show_drop(own, other, how):
    """Print how much worse each row is on other audio."""
    drops = [
        (mine.label, [f"{mine.numbers[key] - theirs.numbers[key]:+.3f}".replace("+nan", "-") for key in DROPS])
        for mine, theirs in zip(own, other, strict=True)
    ]
    screen.show_table(f"Own audio less {how}", list(DROPS.values()), drops)


def main():
    settings = cli.parse(Settings, __doc__)
    chosen = evaluate.evaluations(settings, settings.output)
    for evaluation in chosen:
        for name in ("own", settings.how):
            answers.check_folder(evaluation.output / name)
    with ExitStack() as locks:
        for evaluation in chosen:
            locks.enter_context(files.lock(evaluation.output / settings.how, "evaluate", "--output"))
        processes.start()
        settings = evaluate.choose_model(chosen[-1], settings)
        utterances = evaluate.read_corpus(chosen[-1], settings)
        own, other = zip(*(ablate(evaluation, utterances, settings) for evaluation in chosen))
        own, other = sum(own, []), sum(other, [])
        if own:
            evaluate.show([row for pair in zip(own, other) for row in pair], [])
            show_drop(own, other, settings.how)
        processes.end()


if __name__ == "__main__":
    cli.run_script("analysis.ablation", main)
