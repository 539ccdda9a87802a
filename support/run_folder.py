"""What train.py leaves in a run folder: adapters of its epochs, their settings, the best of them."""

import os
import re
from typing import Annotated

from pydantic import Field

from support import choices, cli, files


class TrainingSettings(files.Shape):
    """settings.json, which train.py writes beside an adapter."""

    epoch: Annotated[int, Field(ge=1, le=cli.LARGEST)]
    strategy: choices.Strategy
    speech_adapter: choices.SpeechAdapter
    model: str
    data: str
    revision: str | None = None
    data_revision: str | None = None
    dtype: choices.Dtype | None = None
    attention: choices.Attention | None = None
    quantize: choices.Quantize | None = None
    max_tokens: cli.Count = 2048


class ValidatedEpoch(files.Shape):
    """A line of validation.jsonl, which train.py --validation writes."""

    epoch: int
    best: bool


def adapters(run, epochs):
    """The adapters that `--adapter` and `--epochs` name, as (folder, TrainingSettings), earliest epoch first.

    epochs: "last" or None, "best", "all", or a number as text. Raises InputError where there is none.
    """
    if any(map(os.path.isfile, (run / "adapter_config.json", run / "trained.safetensors"))):
        if epochs:
            raise cli.InputError(f"{run} is one epoch: leave out --epochs {epochs}, or give the folder above")
        return [(run, _settings(run))]
    found = [file.parent for file in run.glob("epoch-*/settings.json")]
    found = sorted((f for f in found if re.fullmatch(r"epoch-\d+", f.name)), key=lambda f: int(f.name[6:]))
    if not found:
        raise cli.InputError(f"{run} holds no adapter (no epoch-*/settings.json): give train.py's --output")
    if epochs == "best":
        epochs = _best_epoch(run)
    chosen = {None: found[-1:], "last": found[-1:], "all": found}
    folders = chosen.get(epochs, [folder for folder in found if folder.name == f"epoch-{epochs}"])
    if not folders:
        raise cli.InputError(f"{run} has no epoch {epochs!r}: there are {', '.join(f.name for f in found)}")
    return [(folder, _settings(folder)) for folder in folders]


def _settings(folder):
    return files.read_json(folder / "settings.json", TrainingSettings)


def _best_epoch(run):
    path = run / "validation.jsonl"
    lines = files.read_lines(path, ValidatedEpoch) if path.exists() else []
    best = [str(line.epoch) for line in lines if line.best]
    if len(best) != 1:
        raise cli.InputError(
            f"--epochs best: {path} is missing or marks {len(best)} epochs; it is written by train.py --validation 0.1"
        )
    return best[0]
