"""What each number means. Text in, numbers out; no model, no torch.

Error rates are fractions (0.114, not 11.4 %). Everything that counts errors is pooled over the corpus: sums of counts
are divided, utterances are never averaged. Correlations are over utterances.

There are two F1s, because the paper's definition (4.3) and its figures (Table 3) do not describe the same number:

    detection F1        mispronunciations found, the convention of the field (Kaldi-style scoring, `detection_counts`)
    phone agreement F1  position-by-position agreement of two phone strings, weighted over phones (`phone_agreement`).
                        Random errors put into the test labels at a PER of 0.11 give 0.56 where they are spread evenly
                        and 0.77 where they gather in a third of the utterances; the paper has 0.724 at 0.114
"""

import math
import re
import warnings
from collections import Counter

import jiwer
from scipy import stats

SCORES = ("accuracy", "fluency", "prosodic", "total")


def normalise_words(text):
    """Words as they are compared: upper case, no punctuation other than apostrophes inside a word."""
    words = re.sub(r"[^\w']|_", " ", text.replace("’", "'").upper()).split()
    return [word for word in (word.strip("'") for word in words) if word]


def normalise_phones(text):
    """Phones as they are compared: upper case, stress digits removed; `<unk>` and starred phones stay themselves."""
    phones = [re.sub(r"\d", "", phone.upper()) for phone in text.split()]
    return ["<unk>" if phone == "<UNK>" else phone for phone in phones if phone]


def error_rate(references, hypotheses):
    """(substitutions + deletions + insertions) / reference length, pooled over the corpus (paper 4.3).

    Both are lists with one list of words or phones per utterance. nan when the references hold nothing.
    """
    if not any(references):
        return math.nan
    return jiwer.wer([" ".join(r) for r in references], [" ".join(h) for h in hypotheses])


def align(first, second):
    """The edit-distance alignment of two sequences, as pairs; None stands for a gap.

    Unit costs. Where several alignments cost the same, the traceback from the end takes a match or substitution if
    it is no worse than both others, else a gap in `second` (a deletion) if no worse than a gap in `first`: the rule
    of Kaldi's `align-text`, on which published detection figures rest.
    """
    rows, columns = len(first) + 1, len(second) + 1
    cost = [[i + j if i * j == 0 else 0 for j in range(columns)] for i in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            substitution = cost[i - 1][j - 1] + (first[i - 1] != second[j - 1])
            cost[i][j] = min(substitution, cost[i - 1][j] + 1, cost[i][j - 1] + 1)

    pairs = []
    i, j = rows - 1, columns - 1
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (first[i - 1] != second[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((first[i], second[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((first[i], None))
        else:
            j -= 1
            pairs.append((None, second[j]))
    return pairs[::-1]


def detection_counts(canonical, heard, predicted):
    """Mispronunciation detection and diagnosis, counted per phone and pooled over the corpus.

    The three arguments are lists with one list of phones per utterance: what should be said, what raters heard, what
    the model wrote. Three alignments decide: canonical-heard says what was mispronounced, heard-predicted whether the
    model heard the same, canonical-predicted what became of phones the speaker left out. The positive class is a
    mispronunciation; a wrong diagnosis is still a detection. Phones that only the model has are counted nowhere here
    (they count in the PER). This is the scoring of the CTC-Attention-Mispronunciation and HMamba recipes.

        canonical  DH AH K AE T
        heard      D  AH K AE      (DH said as D, T left out)
        predicted  D  AH G AE T    -> D: correct diagnosis; AH, AE: true accepts; G: a false reject; T: a false accept

    Returns counts of true_accept, false_reject, false_accept, correct_diagnosis, diagnosis_error.
    """
    counts = Counter(true_accept=0, false_reject=0, false_accept=0, correct_diagnosis=0, diagnosis_error=0)
    for said, perceived, written in zip(canonical, heard, predicted, strict=True):
        counts.update(_detection_events(said, perceived, written))
    return dict(counts)


def _detection_events(canonical, heard, predicted):
    said = align(canonical, heard)
    written_for_heard = [written for phone, written in align(heard, predicted) if phone is not None]
    written_for_canonical = [written for phone, written in align(canonical, predicted) if phone is not None]

    spoken = [(phone, perceived) for phone, perceived in said if perceived is not None]
    for (phone, perceived), written in zip(spoken, written_for_heard, strict=True):
        if phone == perceived:
            yield "true_accept" if written == perceived else "false_reject"
        elif written == perceived:
            yield "correct_diagnosis"
        else:  # writing the canonical phone, or nothing for an added one, is what a correct speaker would get
            yield "false_accept" if written == phone else "diagnosis_error"

    required = [(phone, perceived) for phone, perceived in said if phone is not None]
    for (phone, perceived), written in zip(required, written_for_canonical, strict=True):
        if perceived is None:  # left out by the speaker
            if written is None:
                yield "correct_diagnosis"
            else:
                yield "false_accept" if written == phone else "diagnosis_error"


def detection_scores(counts):
    """Precision, recall and F1 of detection from pooled counts; nan where a denominator is zero.

    precision = detected / (detected + false_reject), recall = detected / (detected + false_accept), with
    detected = correct_diagnosis + diagnosis_error.
    """
    detected = counts["correct_diagnosis"] + counts["diagnosis_error"]
    precision = _ratio(detected, detected + counts["false_reject"])
    recall = _ratio(detected, detected + counts["false_accept"])
    f1 = _ratio(2 * detected, 2 * detected + counts["false_reject"] + counts["false_accept"])
    return {"precision": precision, "recall": recall, "f1": f1}


def phone_agreement(heard, predicted):
    """Precision, recall and F1 of phones by position, weighted over phones by how often they were heard.

    Position i of one string is compared with position i of the other, without alignment; one-vs-rest scores of each
    phone are averaged with its frequency in `heard` as weight (0 for a phone that is never predicted). Not the
    field's convention: reported because the paper's Table 3 fits it.
    """
    support, written, agreed = Counter(), Counter(), Counter()
    for perceived, output in zip(heard, predicted, strict=True):
        support.update(perceived)
        written.update(output)
        agreed.update(a for a, b in zip(perceived, output) if a == b)
    total = support.total()

    def weighted(score):
        return _ratio(sum(support[phone] * score(phone) for phone in support), total)

    return {
        "precision": weighted(lambda phone: agreed[phone] / written[phone] if written[phone] else 0.0),
        "recall": weighted(lambda phone: agreed[phone] / support[phone]),
        "f1": weighted(lambda phone: 2 * agreed[phone] / (support[phone] + written[phone])),
    }


def correlation(predicted, human):
    """Pearson correlation, its two-sided p-value, and the mean absolute error in score points (0-10).

    Returns (pcc, pvalue, mae, reason). Where the correlation does not exist, pcc and pvalue are nan and `reason`
    says why; otherwise it is None.
    """
    if not predicted:
        return math.nan, math.nan, math.nan, "no scores"
    mae = sum(abs(p - h) for p, h in zip(predicted, human, strict=True)) / len(predicted)
    if len(predicted) < 3:
        return math.nan, math.nan, mae, f"only {len(predicted)} utterances"
    for name, values in (("predicted", predicted), ("human", human)):
        if len(set(values)) == 1:
            return math.nan, math.nan, mae, f"all {len(values)} {name} scores are {values[0]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pcc, pvalue = stats.pearsonr(predicted, human)
    return float(pcc), float(pvalue), mae, None


def summarise(apa, mdd):
    """All numbers of one evaluation, with flat keys in the order of the paper's Table 3.

    apa: list of (parsed scores or None, human scores); unparsed outputs leave the correlations, and their share
        stands beside them as `apa_unparsed`.
    mdd: list of (parsed transcripts or None, reference with word_transcript, canonical, heard); an unparsed output
        counts as an empty transcript.
    Returns (numbers, reasons); `reasons` says of each missing correlation why it is nan.
    """
    numbers, reasons = {}, {}
    parsed = [(scores, human) for scores, human in apa if scores is not None]
    for name in SCORES:
        pcc, pvalue, mae, reason = correlation([s[name] for s, _ in parsed], [h[name] for _, h in parsed])
        numbers |= {f"{name}_pcc": pcc, f"{name}_pvalue": pvalue, f"{name}_mae": mae}
        if reason:
            reasons[f"{name}_pcc"] = reason if parsed or not apa else f"none of {len(apa)} outputs could be parsed"

    words = [normalise_words(output["word_transcript"]) if output else [] for output, _ in mdd]
    phones = [normalise_phones(output["phoneme_transcript"]) if output else [] for output, _ in mdd]
    canonical = [reference["canonical"] for _, reference in mdd]
    heard = [reference["heard"] for _, reference in mdd]
    numbers["wer"] = error_rate([normalise_words(reference["word_transcript"]) for _, reference in mdd], words)
    numbers["per"] = error_rate(heard, phones)
    counts = detection_counts(canonical, heard, phones)
    numbers |= {f"detection_{key}": value for key, value in detection_scores(counts).items()}
    numbers |= counts
    numbers |= {f"phone_agreement_{key}": value for key, value in phone_agreement(heard, phones).items()}
    numbers["apa_unparsed"] = _ratio(len(apa) - len(parsed), len(apa))
    numbers["mdd_unparsed"] = _ratio(sum(output is None for output, _ in mdd), len(mdd))
    return numbers, reasons


def _ratio(numerator, denominator):
    return numerator / denominator if denominator else math.nan
