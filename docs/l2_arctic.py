"""A reader of L2-ARCTIC, https://psi.engr.tamu.edu/l2-arctic-corpus: the phones as they were annotated, no scores.

    python train.py --data l2arctic/ --data-reader docs/l2_arctic.py
    python evaluate.py --adapter out/ --data-reader docs/l2_arctic.py

A speaker's folder has wav/ID.wav, transcript/ID.txt and, for some 150 sentences, annotation/ID.TextGrid with two tiers:
"words", and "phones", where a label is a phone that was said as it should be, such as AH0, or three parts:

    TH,S,s  S in the place of TH       T,sil,d  T left out       sil,AH,a  AH added       R,err,s  R as no phone

Written from the corpus' documentation; it was not run on the corpus itself yet.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
import re

import data
from support import cli, files

TEST = ("NJS", "TLV", "TNI", "TXHC", "YKWK", "ZHAA")  # one of each first language; most papers test on these
SILENCE = ("", "SIL", "SP", "SPN")
INTERVAL = re.compile(r'xmin = ([\d.]+)\s+xmax = ([\d.]+)\s+text = "(.*?)"')


def read(root: Path, split: str) -> data.Reader:
    """Yields (id, make) for each annotated sentence of the split's speakers."""
    if split not in ("train", "test"):
        raise cli.InputError(f"L2-ARCTIC is read as train and test, not as {split}")
    for path in sorted(root.glob("*/annotation/*.TextGrid")):
        if (path.parts[-3] in TEST) == (split == "test"):
            yield f"{path.parts[-3]}-{path.stem}", partial(utterance, path)


def utterance(path: Path) -> data.Utterance:
    """One sentence. A phone belongs to the word that its middle is in, or else to the word before."""
    folder, id = path.parent.parent, path.stem
    tiers = dict(re.findall(r'name = "(\w+)"(.*?)(?=item \[|\Z)', files.read_text(path), re.DOTALL))
    words = [(start, text, []) for start, _, text in intervals(tiers.get("words", "")) if text.upper() not in SILENCE]
    if not words:
        raise cli.InputError(f"{path} has no tier of words in Praat's long text format")
    for start, end, label in intervals(tiers.get("phones", "")):
        should, said = (re.sub(r"[\d\s]", "", label.upper()).split(",") * 2)[:2]  # a phone alone is both
        begun = [word for word in words if word[0] <= (start + end) / 2]
        (begun or words[:1])[-1][2].append((should, "<unk>" if said == "ERR" else said))
    spoken = []
    for _, text, pairs in words:
        canonical, heard = (tuple(pair[i] for pair in pairs if pair[i] not in SILENCE) for i in (0, 1))
        wrong = sum(should != said for should, said in pairs if should not in SILENCE)
        spoken.append(data.Word(text, canonical, heard, wrong))
    recording = partial(files.read_bytes, folder / "wav" / f"{id}.wav")
    text, length = files.read_text(folder / "transcript" / f"{id}.txt").strip(), data.read_length(recording)
    return data.Utterance(f"{folder.name}-{id}", recording, length, text, None, tuple(spoken), folder.name)


def intervals(tier: str) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of each interval of a tier; times in seconds."""
    return ((float(start), float(end), text) for start, end, text in INTERVAL.findall(tier))
