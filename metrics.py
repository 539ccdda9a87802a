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

import numpy as np
from scipy import stats

from prompts import SCORES

RESAMPLES = 1000  # of the bootstrap
LEVEL = 0.95  # of its intervals
EVENTS = ("true_accept", "false_reject", "false_accept", "correct_diagnosis", "diagnosis_error")
RIGHT = ("true_accept", "correct_diagnosis", "diagnosis_error")  # detection decided well; diagnosis is another matter


def normalise_words(text):
    """Words as they are compared: upper case, no punctuation other than apostrophes inside a word."""
    words = re.sub(r"[^\w']|_", " ", text.replace("’", "'").upper()).split()
    return [word for word in (word.strip("'") for word in words) if word]


def normalise_phones(text):
    """Phones as they are compared: upper case, stress digits removed; `<unk>` and starred phones stay themselves."""
    phones = [re.sub(r"\d", "", phone.upper()) for phone in text.split()]
    return ["<unk>" if phone == "<UNK>" else phone for phone in phones if phone]


def error_counts(references, hypotheses):
    """Substitutions, deletions, insertions and reference length of each utterance, (N, 4), by jiwer's alignment.

    Both are lists with one list of words or phones per utterance.
    """
    import jiwer

    if not references:
        return np.zeros((0, 4))
    output = jiwer.process_words([" ".join(r) for r in references], [" ".join(h) for h in hypotheses])
    counts = []
    for reference, alignment in zip(references, output.alignments, strict=True):
        of = Counter()
        for chunk in alignment:
            of[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        counts.append((of["substitute"], of["delete"], of["insert"], len(reference)))
    return np.array(counts, dtype=np.float64)


def error_rate(references, hypotheses):
    """(substitutions + deletions + insertions) / reference length, pooled over the corpus (paper 4.3).

    Both are lists with one list of words or phones per utterance. nan when the references hold nothing.
    """
    substitutions, deletions, insertions, length = error_counts(references, hypotheses).sum(axis=0)
    return float(_ratio(substitutions + deletions + insertions, length))


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


def kind_of(first, second):
    """What an aligned pair is, with None for a gap: same, substituted, missing (in `second`) or added (by it)."""
    if first is None:
        return "added"
    return "missing" if second is None else "same" if first == second else "substituted"


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
    events = Counter(event for utterance in detection_events(canonical, heard, predicted) for event in utterance)
    return {name: events[name] for name in EVENTS}


def detection_events(canonical, heard, predicted):
    """What became of each phone, see `detection_counts`: a list with one list of event names per utterance.

    Which phones there are depends on canonical and heard alone, so the events of two systems can be paired.
    """
    return [list(_detection_events(*phones)) for phones in zip(canonical, heard, predicted, strict=True)]


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
    """Detection and diagnosis from pooled counts; nan where a denominator is zero.

    With detected = correct_diagnosis + diagnosis_error:
        precision = detected / (detected + false_reject)        recall = detected / (detected + false_accept)
        far, false acceptance = false_accept / mispronounced = 1 - recall
        frr, false rejection = false_reject / phones said right
        der, diagnosis error = diagnosis_error / detected
    counts: numbers, or arrays of them.
    """
    detected = counts["correct_diagnosis"] + counts["diagnosis_error"]
    wrong, missed = counts["false_reject"], counts["false_accept"]
    return {
        "precision": _ratio(detected, detected + wrong),
        "recall": _ratio(detected, detected + missed),
        "f1": _ratio(2 * detected, 2 * detected + wrong + missed),
        "far": _ratio(missed, detected + missed),
        "frr": _ratio(wrong, wrong + counts["true_accept"]),
        "der": _ratio(counts["diagnosis_error"], detected),
    }


def phone_agreement(heard, predicted):
    """Precision, recall and F1 of phones by position, weighted over phones by how often they were heard.

    Position i of one string is compared with position i of the other, without alignment; one-vs-rest scores of each
    phone are averaged with its frequency in `heard` as weight (0 for a phone that is never predicted). Not the
    field's convention: reported because the paper's Table 3 fits it.
    """
    scores = _agreement_scores(*(counts.sum(axis=0) for counts in phone_counts(heard, predicted)))
    return {key: float(value) for key, value in scores.items()}


def _agreement_scores(support, written, agreed):
    """Of counts of each phone, (..., P): heard, written by the model, and both in one position."""

    def weighted(numerator, denominator):
        return _ratio((support * np.nan_to_num(_ratio(numerator, denominator))).sum(axis=-1), support.sum(axis=-1))

    return {
        "precision": weighted(agreed, written),
        "recall": weighted(agreed, support),
        "f1": weighted(2 * agreed, support + written),
    }


def phone_counts(heard, predicted):
    """How often each phone was heard, written, and both in one position; three arrays (N, P), P phones by name."""
    column = {phone: i for i, phone in enumerate(sorted({p for phones in [*heard, *predicted] for p in phones}))}
    support, written, agreed = (np.zeros((len(heard), len(column))) for _ in range(3))
    for row, (perceived, output) in enumerate(zip(heard, predicted, strict=True)):
        agreement = [a for a, b in zip(perceived, output) if a == b]
        for table, phones in ((support, perceived), (written, output), (agreed, agreement)):
            np.add.at(table[row], [column[phone] for phone in phones], 1)
    return support, written, agreed


def phone_report(heard, predicted):
    """For each phone, by the alignment of `align`: how often it was heard, precision, recall, its confusions.

    Returns a list of dicts with phone, support, precision, recall and confusions [(written phone or None, count)], the
    most frequent phone first; phone None stands for what only the model wrote.
    """
    pairs = Counter(pair for utterance in zip(heard, predicted, strict=True) for pair in align(*utterance))
    support, written = Counter(), Counter()
    for (perceived, output), count in pairs.items():
        support[perceived] += count
        written[output] += count
    return [
        {
            "phone": phone,
            "support": count,
            "precision": float(_ratio(pairs[phone, phone], written[phone])),
            "recall": float(_ratio(pairs[phone, phone], count)),
            "confusions": sorted(((b, n) for (a, b), n in pairs.items() if a == phone != b), key=lambda c: -c[1]),
        }
        for phone, count in support.most_common()
    ]


def expectation(probabilities):
    """The mean score of a distribution over the values 0, 1, 2, ..."""
    return sum(value * probability for value, probability in enumerate(probabilities))


def likeliest(probabilities):
    """The value with the highest probability, the lowest one of several."""
    return max(range(len(probabilities)), key=probabilities.__getitem__)


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
            return math.nan, math.nan, mae, f"all {len(values)} {name} scores are {values[0]:g}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pcc, pvalue = stats.pearsonr(predicted, human)
    return float(pcc), float(pvalue), mae, None


# ----------------------------------------------------------------------------------------------------------------------
# All numbers of an evaluation: what each output contributes, the sums, the numbers


def contributions(apa, mdd):
    """What each output adds to the sums that all numbers are made of: two dicts of arrays, (N,) or (N, P).

    See `summarise` for the arguments. Every number is a function of sums over outputs, so a resample of the corpus is
    a matrix product.
    """
    parsed = np.array([scores is not None for scores, _ in apa], dtype=np.float64)
    ours = {"apa": np.ones(len(apa)), "apa_parsed": parsed}
    for name in SCORES:
        # about 5, the middle of the scale: squares of small numbers are rounded less
        x = np.array([scores[name] - 5 if scores else 0 for scores, _ in apa], dtype=np.float64)
        y = np.array([human[name] - 5 for _, human in apa], dtype=np.float64) * parsed
        products = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "error": abs(x - y)}
        ours |= {f"{name}_{key}": values for key, values in products.items()}

    words = [normalise_words(output["word_transcript"]) if output else [] for output, _ in mdd]
    phones = [normalise_phones(output["phoneme_transcript"]) if output else [] for output, _ in mdd]
    canonical = [reference["canonical"] for _, reference in mdd]
    heard = [reference["heard"] for _, reference in mdd]
    theirs = {"mdd": np.ones(len(mdd)), "mdd_parsed": np.array([o is not None for o, _ in mdd], dtype=np.float64)}
    spoken = [normalise_words(reference["word_transcript"]) for _, reference in mdd]
    for name, counts in (("word", error_counts(spoken, words)), ("phone", error_counts(heard, phones))):
        theirs |= {f"{name}_{key}": counts[:, i] for i, key in enumerate(("sub", "del", "ins", "length"))}
    events = [Counter(utterance) for utterance in detection_events(canonical, heard, phones)]
    theirs |= {name: np.array([counts[name] for counts in events], dtype=np.float64) for name in EVENTS}
    theirs |= dict(zip(("support", "written", "agreed"), phone_counts(heard, phones)))
    return ours, theirs


def numbers_of(sums):
    """All numbers, from sums of `contributions`, in the order of the paper's Table 3; arrays give arrays."""
    numbers, n = {}, sums["apa_parsed"]
    for name in SCORES:
        x, y, xx, yy, xy, error = (sums[f"{name}_{key}"] for key in ("x", "y", "xx", "yy", "xy", "error"))
        spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
        numbers[f"{name}_pcc"] = np.where(n >= 3, _ratio(n * xy - x * y, np.sqrt(spread)), math.nan)
        numbers[f"{name}_mae"] = _ratio(error, n)
    for name, kind in (("wer", "word"), ("per", "phone")):
        parts = {key: _ratio(sums[f"{kind}_{key}"], sums[f"{kind}_length"]) for key in ("sub", "del", "ins")}
        numbers[name] = parts["sub"] + parts["del"] + parts["ins"]
        numbers |= {f"{name}_{key}": value for key, value in parts.items()}
    numbers |= {f"detection_{key}": value for key, value in detection_scores(sums).items()}
    agreement = _agreement_scores(sums["support"], sums["written"], sums["agreed"])
    numbers |= {f"phone_agreement_{key}": value for key, value in agreement.items()}
    for task in ("apa", "mdd"):
        numbers[f"{task}_unparsed"] = _ratio(sums[task] - sums[f"{task}_parsed"], sums[task])
    return numbers


def summarise(apa, mdd):
    """All numbers of one evaluation, with flat keys.

    apa: list of (parsed scores or None, human scores); unparsed outputs leave the correlations, and their share
        stands beside them as `apa_unparsed`.
    mdd: list of (parsed transcripts or None, reference with word_transcript, canonical, heard); an unparsed output
        counts as an empty transcript.
    Returns (numbers, reasons); `reasons` says of each missing correlation why it is nan.
    """
    ours, theirs = contributions(apa, mdd)
    sums = {key: values.sum(axis=0) for key, values in (ours | theirs).items()}
    numbers, reasons = {key: float(value) for key, value in numbers_of(sums).items()}, {}
    numbers |= {name: int(sums[name]) for name in EVENTS}
    parsed = [(scores, human) for scores, human in apa if scores is not None]
    for name in SCORES:
        pcc, pvalue, mae, reason = correlation([s[name] for s, _ in parsed], [h[name] for _, h in parsed])
        numbers |= {f"{name}_pcc": pcc, f"{name}_pvalue": pvalue, f"{name}_mae": mae}
        if reason:
            reasons[f"{name}_pcc"] = reason if parsed or not apa else f"none of {len(apa)} outputs could be parsed"
    return numbers, reasons


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty: other speakers might have been recorded


def resample(apa, mdd, apa_speakers, mdd_speakers, seed=0):
    """All numbers on RESAMPLES corpora of as many speakers, drawn with replacement: {key: (RESAMPLES,)}.

    Speakers, not utterances: those of one speaker resemble each other, and counting them as independent would make
    intervals too narrow. apa, mdd: see `summarise`; the speakers' names are in their order. The draws depend on the
    set of speakers and the seed alone, so two systems' numbers can be subtracted from each other.
    """
    names = {*apa_speakers, *mdd_speakers}
    ours, theirs = contributions(apa, mdd)
    return numbers_of(
        resampled_sums(ours, apa_speakers, names, seed) | resampled_sums(theirs, mdd_speakers, names, seed)
    )


def resampled_sums(values, groups, names, seed=0):
    """Sums over RESAMPLES draws, with replacement, of as many groups as there are: {key: (RESAMPLES, ...)}.

    values: {key: (N, ...)}, what each item adds; groups: each item's group, such as its speaker; names: all groups that
    are drawn from. The draws depend on names and seed alone.
    """
    names = sorted(names)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)  # (R, groups)
    index = [names.index(group) for group in groups]
    sums = {}
    for key, items in values.items():
        by_group = np.zeros((len(names), *items.shape[1:]))
        np.add.at(by_group, index, items)
        sums[key] = weights @ by_group
    return sums


def interval(samples):
    """Percentile interval at LEVEL, (low, high); nan where most resamples have no such number."""
    samples = samples[np.isfinite(samples)]
    if len(samples) < RESAMPLES / 2:
        return math.nan, math.nan
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_pvalue(differences):
    """Two-sided bootstrap p-value of a difference: how often resamples have it on either side of zero."""
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return math.nan
    side = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return float(min(1.0, max(2 * side, 2 / len(differences))))


def mcnemar(first, second):
    """McNemar's exact test on the decisions of two systems about the same items, phones for example.

    first, second: whether each decision is right. Returns (only the first is right, only the second is right, p-value).
    Items are taken as independent, which those of a speaker are not quite.
    """
    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    ours, theirs = pairs[True, False], pairs[False, True]
    return ours, theirs, float(stats.binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0


def share_interval(count, total):
    """Wilson's interval of a share at LEVEL, (low, high), for items that are independent; nan where there are none."""
    if not total:
        return math.nan, math.nan
    low, high = stats.binomtest(count, total).proportion_ci(LEVEL, "wilson")
    return float(low), float(high)


def _ratio(numerator, denominator):
    """numerator / denominator, nan where the denominator is zero; numbers or arrays."""
    numerator, denominator = np.broadcast_arrays(np.float64(numerator), np.float64(denominator))
    return np.divide(numerator, denominator, out=np.full(denominator.shape, math.nan), where=denominator != 0)


def speaker_weights(speakers, names=None, seed=0):
    """How often each utterance is in each of RESAMPLES draws of as many speakers, with replacement, (RESAMPLES, N)."""
    names = sorted(set(speakers) if names is None else names)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return weights[:, [names.index(speaker) for speaker in speakers]]
