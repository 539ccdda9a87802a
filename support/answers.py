"""Answers on disk: kept as they come, gone on with after a stop, whole and in the order of the corpus at the end."""

import json
import os

import data
from support import choices, cli, files, predictions
from support.later import when_used

with when_used():
    from support import processes

WHOLE, PART, SETTINGS = GENERATED = ("predictions.jsonl", "predictions.jsonl.part", "predictions.settings.json")
SCORED = ("metrics.json", "figure5.png")  # what scoring writes beside them


class Writer(files.Shape):
    """What of predictions.settings.json is read again: which model wrote the answers."""

    evaluated: str  # its label
    strategy: choices.Strategy | None = None  # of its training; None for the unmodified model
    epoch: int | None = None


def writer(path):
    """The Writer of a saved predictions file; None where it is not known: then the file stands alone."""
    beside = path.with_name(SETTINGS)
    # While there is a part, the settings are those of the part
    known = path.name == WHOLE and beside.is_file() and not path.with_name(PART).exists()
    return files.read_json(beside, Writer) if known else None


class Answers:
    """predictions.jsonl of one evaluation, while it is generated; --resume starts with the answers that are there.

    settings: plain values that the answers depend on; with others --resume raises InputError, as for a broken file.
    Collective: every rank must make it, and call `add` and `finish`. Rank 0 writes.
    """

    def __init__(self, folder, utterances, settings, resume):
        self.utterances, self.gather = utterances, processes.gather
        self.whole, self.part, written_with = (folder / name for name in GENERATED)
        lines = _resumed(folder, utterances, settings) if resume else {}
        self.lines = self.gather(lines)[0]  # {(id, task): JSON text}; rank 0 decides, before it writes
        with files.whole(written_with) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        self._write(self.part, self.lines.values())

    @property
    def missing(self):
        """The utterances that lack an answer."""
        return [u for u in self.utterances if any((u.id, task) not in self.lines for task in u.tasks)]

    def add(self, answers):
        """Keep a process' answers, dicts as predictions.jsonl holds them."""
        new = [answer for part in self.gather(answers) for answer in part]
        new = {(answer["id"], answer["task"]): json.dumps(answer, ensure_ascii=False) for answer in new}
        self.lines |= new
        if cli.process_rank() == 0:
            with open(self.part, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new.values()))

    def finish(self):
        """Write predictions.jsonl."""
        self._write(self.whole, [self.lines[u.id, task] for u in self.utterances for task in u.tasks])
        if cli.process_rank() == 0:
            self.part.unlink()

    def _write(self, path, lines):
        with files.whole(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _resumed(folder, utterances, settings):
    whole, part, written_with = (folder / name for name in GENERATED)
    path = part if part.exists() else whole
    if not path.exists():
        return {}
    if not written_with.exists() or files.read_json(written_with, dict) != settings:
        raise cli.InputError(
            f"--resume: the outputs in {folder} are of another model, corpus or setting: give the same ones, "
            f"or choose another --output"
        )
    try:
        return _answers(path, utterances)
    except cli.InputError as error:
        raise cli.InputError(f"--resume: {error}; leave out --resume to start again") from error


def find(folder, utterances, settings):
    """The records of an evaluation that answer these utterances, perhaps among others; None where one is missing.

    settings: as for `Answers`; only the corpus may be another.
    """
    try:
        written_with = files.read_json(folder / SETTINGS, dict)
        lines = _answers(folder / WHOLE, utterances)
    except cli.InputError:
        return None
    if written_with | {"corpus": None} != settings | {"corpus": None} or lines.keys() != _asked(utterances).keys():
        return None
    return [json.loads(lines[key]) for key in _asked(utterances)]


def _answers(path, utterances):
    """{(id, task): JSON text} of a file's answers to these utterances."""
    asked, texts = _asked(utterances), files.read_text(path).split("\n")
    records = predictions.read(path, cut_off=True)
    return {_key(record): text for record, text in zip(records, texts) if asked.get(_key(record)) == _said(record)}


def _key(record):
    return record["id"], record["task"]


def _said(record):
    return record["reference"], record.get("speaker")


def _asked(utterances):
    return {(u.id, task): (data.reference(u, task), u.speaker) for u in utterances for task in u.tasks}


def read(folder, utterances):
    """The records of predictions.jsonl. Raises RunError unless they answer these utterances, each task once."""
    records = predictions.read(folder / WHOLE)
    asked, answered = _asked(utterances), {_key(record): _said(record) for record in records}
    if asked != answered:
        found = sum(answered.get(key) == said for key, said in asked.items())
        raise cli.RunError(
            f"{folder / WHOLE} has {found:,} of the {len(asked):,} answers that were asked for, "
            f"and {len(answered) - found:,} others: evaluate again, without --resume"
        )
    return records


def check_folder(folder, scored=None):
    """Raises InputError where a file would be replaced that evaluate.py did not write.

    scored: the saved file of --predictions, beside which nothing is generated.
    """
    names = SCORED if scored else SCORED + GENERATED
    there = [folder / name for name in names if os.path.lexists(folder / name)]
    foreign = [
        path for path in there if path.is_dir() or (scored and os.path.realpath(path) == os.path.realpath(scored))
    ]
    foreign = foreign or (there if not _written_here(folder) else [])
    if foreign:
        raise cli.InputError(
            f"{foreign[0]} would be replaced, and evaluate.py did not write it: choose another --output, "
            f"or move it away"
        )


def _written_here(folder):
    try:
        return (folder / SETTINGS).is_file() or bool(predictions.read_metrics(folder / "metrics.json"))
    except cli.InputError:
        return False
