"""How often are phones marked that a good speaker may say, and is a real error hidden?

    python bench/pronunciations.py --data speechocean762/           # a minute

Two readers say every sentence of the test part. The perfect one says the corpus' own canonical phones, so every mark is
a false one. The real one said what raters heard, so a word of theirs with a wrong phone and without a mark is a hidden
error. Each pronunciation in the train part counts as right, and each in the CMU dictionary.
"""

from dataclasses import dataclass

import workload  # noqa: F401  first: it finds the project

# isort: split
from analysis import pronunciations
import data
import metrics
from support import cli, screen


@dataclass
class Settings:
    data: str  # corpus folder, or hub id


def first_only(lexicon):
    return {word: variants[:1] for word, variants in lexicon.items()}


def measure(utterances, lexicons):
    """Shares and counts of what is marked, as a dict."""
    phones = false = sentences = wrong_words = hidden = left_out = 0
    for utterance in utterances:
        # A word of the corpus is one of the text where both are written alike
        if metrics.normalise_words(utterance.text) != [word.text.upper() for word in utterance.words]:
            left_out += 1
            continue
        try:
            words = pronunciations.of_text(utterance.text, lexicons)
        except cli.InputError:  # a word that no lexicon has: the user would be asked for it
            left_out += 1
            continue
        perfect = pronunciations.meant(words, utterance.canonical)
        marked = sum(mark[0] != "same" for _, marks in perfect for mark in marks)
        phones, false, sentences = phones + len(utterance.canonical), false + marked, sentences + (marked > 0)
        for word, (_, marks) in zip(utterance.words, pronunciations.meant(words, utterance.heard), strict=True):
            wrong_words += word.heard != word.canonical
            hidden += word.heard != word.canonical and all(mark[0] == "same" for mark in marks)
    found = {"sentences": len(utterances) - left_out, "left_out": left_out, "phones": phones, "false_marks": false}
    return found | {"marked_sentences": sentences, "wrong_words": wrong_words, "hidden": hidden}


def main():
    settings = cli.parse(Settings, __doc__)
    train, test = (data.read_corpus(settings.data, split) for split in ("train", "test"))
    corpus, dictionary = pronunciations.of_corpus(train), pronunciations.of_dictionary()
    ways = {
        "the dictionary's first": [first_only(dictionary)],
        "the dictionary's": [dictionary],
        "the train part's": [corpus],
        "both": [corpus, dictionary],
    }
    rows = []
    for name, lexicons in ways.items():
        of = measure(test, lexicons)
        marked = f"{of['false_marks'] / of['phones']:.2%}", f"{of['marked_sentences']:,} of {of['sentences']:,}"
        rows.append((name, [*marked, f"{of['hidden']} of {of['wrong_words']:,}", str(of["left_out"])]))
    screen.show_table("pronunciations", ["false marks", "in sentences", "hidden words", "left out"], rows)
    print("\nfalse marks: of the perfect reader's phones. left out: sentences with a word that none has.")


if __name__ == "__main__":
    cli.run_script("pronunciations.py", main)
