"""What each number means, and how sure it is. Text in, numbers out; no model, no torch.

Error rates are fractions (0.114, not 11.4 %). Everything that counts errors is pooled over the corpus: sums of counts
are divided, utterances are never averaged. Correlations are over utterances.

A metric takes weights over the N utterances: ones (or none) give the number, those of `speaker_weights`, (R, N), give R
numbers, as other speakers might have given them, and their percentiles are the interval.

There are two F1s, because the paper's definition (4.3) and its figures (Table 3) do not describe the same number:

    detection F1        mispronunciations found, the convention of the field (Kaldi-style scoring, `detection_counts`)
    phone agreement F1  position-by-position agreement of two phone strings, weighted over phones (`phone_agreement`).
                        Random errors put into the test labels at a PER of 0.11 give 0.56 where they are spread evenly
                        and 0.77 where they gather in a third of the utterances; the paper has 0.724 at 0.114
"""

from collections import Counter
import math
import re

import numpy as np

from prompts import SCORES, TASKS, parse_output

RESAMPLES = 1000  # of the bootstrap
LEVEL = 0.95  # of its intervals
SCORINGS = ("greedy", "expected")  # of APA: the written answer (the paper's), the mean of each score's distribution
EVENTS = ("true_accept", "false_reject", "false_accept", "correct_diagnosis", "diagnosis_error")
RIGHT = ("true_accept", "correct_diagnosis", "diagnosis_error")  # detection decided well; diagnosis is another matter


def _sum(values, weights):
    """The sum over utterances. values: (N, ...); weights: (N,) or (R, N), None for ones. Returns (...) or (R, ...)."""
    return values.sum(axis=0) if weights is None else weights @ values


def _mean(values, weights):
    return _ratio(_sum(values, weights), _sum(np.ones(len(values)), weights))


def _ratio(numerator, denominator):
    """numerator / denominator, nan where the denominator is zero; numbers or arrays."""
    numerator, denominator = np.broadcast_arrays(np.float64(numerator), np.float64(denominator))
    return np.divide(numerator, denominator, out=np.full(denominator.shape, math.nan), where=denominator != 0)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def correlation(predicted, human):
    """Pearson correlation, its two-sided p-value, and the mean absolute error in score points (0-10).

    Returns (pcc, pvalue, mae, reason). Where the correlation does not exist, pcc and pvalue are nan and `reason`
    says why; otherwise it is None.
    """
    from scipy import stats  # takes a second

    n, reason = len(human), None
    pcc = float(pearson(predicted, human))
    # how a correlation of independent normal scores is distributed
    pvalue = 2 * stats.beta.sf(abs(pcc), n / 2 - 1, n / 2 - 1, loc=-1, scale=2)
    if n < 3:
        reason = f"only {n} utterances" if n else "no scores"
    elif math.isnan(pcc):
        name, values = ("predicted", predicted) if len(set(predicted)) == 1 else ("human", human)
        reason = f"all {n} {name} scores are {values[0]:g}"
    return pcc, float(pvalue), float(mean_error(predicted, human)), reason


def pearson(predicted, human, weights=None):
    """Pearson correlation of (N,) with (N,); nan for less than three utterances, or where either does not vary."""
    if len(human) < 3:
        return _mean(np.full(len(human), math.nan), weights)
    x, y = (values - np.median(values) for values in (predicted, human))  # small, so squares keep their digits
    n, of_x, of_y = (_sum(values, weights) for values in (np.ones(len(x)), x, y))

    def spread(products, first, second):  # n squared times the covariance; exact for whole numbers
        return n * _sum(products, weights) - first * second

    variances = np.maximum(spread(x * x, of_x, of_x), 0) * np.maximum(spread(y * y, of_y, of_y), 0)
    pcc = np.clip(_ratio(spread(x * y, of_x, of_y), np.sqrt(variances)), -1, 1)
    return np.where(n >= 3, pcc, math.nan)


def mean_error(predicted, human, weights=None):
    """The mean absolute difference of (N,) and (N,)."""
    return _mean(np.abs(np.subtract(predicted, human)), weights)


def expectation(probabilities):
    """The mean score of a distribution over the values 0, 1, 2, ..."""
    return sum(value * probability for value, probability in enumerate(probabilities))


def likeliest(probabilities):
    """The value with the highest probability, the lowest one of several."""
    return max(range(len(probabilities)), key=probabilities.__getitem__)


# ----------------------------------------------------------------------------------------------------------------------
# Words and phones


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


def error_parts(references, hypotheses, weights=None):
    """Substitutions, deletions and insertions, each divided by the reference length; sums of the corpus are divided."""
    *errors, length = np.moveaxis(_sum(error_counts(references, hypotheses), weights), -1, 0)
    return [_ratio(count, length) for count in errors]


def error_rate(references, hypotheses, weights=None):
    """(substitutions + deletions + insertions) / reference length (paper 4.3); nan when the references hold nothing."""
    return sum(error_parts(references, hypotheses, weights))


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


def detection_counts(canonical, heard, predicted, weights=None):
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
    events = detection_events(canonical, heard, predicted)
    counts = {name: np.array([found.count(name) for found in events], dtype=np.int64) for name in EVENTS}  # (N,) each
    return {name: _sum(values, weights) for name, values in counts.items()}


def detection_events(canonical, heard, predicted):
    """What became of each phone, see `detection_counts`: a list with one list of event names per utterance.

    Which phones there are depends on canonical and heard alone, so the events of two systems can be paired.
    """
    return [list(_detection_events(*phones)) for phones in zip(canonical, heard, predicted, strict=True)]


def _detection_events(canonical, heard, predicted):
    said = align(canonical, heard)
    spoken, required = ([pair for pair in said if pair[side] is not None] for side in (1, 0))
    judged = list(zip(spoken, _written_for(heard, predicted), strict=True))
    left_out = zip(required, _written_for(canonical, predicted), strict=True)
    judged += [(pair, written) for pair, written in left_out if pair[1] is None]
    for (phone, perceived), written in judged:
        if phone == perceived:
            yield "true_accept" if written == perceived else "false_reject"
        elif written == perceived:
            yield "correct_diagnosis"
        else:  # writing the canonical phone, or nothing for an added one, is what a correct speaker would get
            yield "false_accept" if written == phone else "diagnosis_error"


def _written_for(phones, predicted):
    """What the model wrote for each of the phones, None for nothing."""
    return [written for phone, written in align(phones, predicted) if phone is not None]


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


def phone_agreement(heard, predicted, weights=None):
    """Precision, recall and F1 of phones by position, weighted over phones by how often they were heard.

    Position i of one string is compared with position i of the other, without alignment; one-vs-rest scores of each
    phone are averaged with its frequency in `heard` as weight (0 for a phone that is never predicted). Not the
    field's convention: reported because the paper's Table 3 fits it.
    """
    support, written, agreed = (_sum(counts, weights) for counts in phone_counts(heard, predicted))  # (..., P)

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


# ----------------------------------------------------------------------------------------------------------------------
# All numbers of an evaluation


def assessment(apa, weights=None):
    """The numbers of scores, by key. apa, weights: see `summarise` and the top of this file."""
    parsed = np.array([scores is not None for scores, _ in apa], dtype=bool)  # (N,)
    own_weights = None if weights is None else weights[..., parsed]
    numbers = {}
    for name in SCORES:
        predicted, human = _scores(apa, name)
        numbers[f"{name}_pcc"] = pearson(predicted, human, own_weights)
        numbers[f"{name}_mae"] = mean_error(predicted, human, own_weights)
    return numbers | {"apa_unparsed": _mean(~parsed, weights)}


def _scores(apa, name):
    pairs = [(scores[name], human[name]) for scores, human in apa if scores is not None]
    return [predicted for predicted, _ in pairs], [human for _, human in pairs]


def diagnosis(mdd, weights=None):
    """The numbers of words and phones, by key. mdd, weights: see `summarise` and the top of this file."""
    canonical, heard, written = phones_of(mdd)
    spoken = [normalise_words(reference["word_transcript"]) for _, reference in mdd]
    words = [normalise_words(output["word_transcript"]) if output else [] for output, _ in mdd]
    numbers = {}
    for name, sides in (("wer", (spoken, words)), ("per", (heard, written))):
        parts = error_parts(*sides, weights)
        numbers[name] = sum(parts)
        numbers |= dict(zip((f"{name}_sub", f"{name}_del", f"{name}_ins"), parts))
    counts = detection_counts(canonical, heard, written, weights)
    numbers |= {f"detection_{key}": value for key, value in detection_scores(counts).items()} | counts
    numbers |= {f"phone_agreement_{key}": v for key, v in phone_agreement(heard, written, weights).items()}
    return numbers | {"mdd_unparsed": _mean(np.array([output is None for output, _ in mdd], dtype=bool), weights)}


def phones_of(mdd):
    """Phones of each utterance, three lists: what should be said, what raters heard, what the model wrote."""
    canonical, heard = ([reference[key] for _, reference in mdd] for key in ("canonical", "heard"))
    return canonical, heard, [normalise_phones(output["phoneme_transcript"]) if output else [] for output, _ in mdd]


def summarise(apa, mdd):
    """All numbers of one evaluation, with flat keys.

    apa: list of (parsed scores or None, human scores); unparsed outputs leave the correlations, and their share
        stands beside them as `apa_unparsed`.
    mdd: list of (parsed transcripts or None, reference with word_transcript, canonical, heard); an unparsed output
        counts as an empty transcript.
    Returns (numbers, reasons); `reasons` says of each missing correlation why it is nan.
    """
    numbers, reasons = {key: value.item() for key, value in (assessment(apa) | diagnosis(mdd)).items()}, {}
    for name in SCORES:
        predicted, human = _scores(apa, name)
        _, numbers[f"{name}_pvalue"], _, reason = correlation(predicted, human)
        if reason:
            reasons[f"{name}_pcc"] = reason if human or not apa else f"none of {len(apa)} outputs could be parsed"
    return numbers, reasons


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty: other speakers might have been recorded


def resample(apa, mdd, apa_speakers, mdd_speakers, seed=0):
    """All numbers on RESAMPLES corpora of as many speakers, drawn with replacement: {key: (RESAMPLES,)}.

    apa, mdd: see `summarise`; the speakers' names are in their order. The draws depend on the set of speakers and the
    seed alone, so two systems' numbers can be subtracted from each other.
    """
    names = {*apa_speakers, *mdd_speakers}
    numbers = assessment(apa, speaker_weights(apa_speakers, names, seed))
    numbers |= diagnosis(mdd, speaker_weights(mdd_speakers, names, seed))
    return {key: values for key, values in numbers.items() if key not in EVENTS}


def speaker_weights(speakers, names=None, seed=0):
    """How often each utterance is in each resample of the speakers, (RESAMPLES, N).

    Speakers, not utterances, are drawn: those of one speaker resemble each other, and counting them as independent
    would make intervals too narrow. speakers: of each utterance; names: all that are drawn from, by default these.
    """
    names = sorted(set(speakers if names is None else names))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)  # (R, names)
    column = {name: i for i, name in enumerate(names)}
    return draws[:, [column[speaker] for speaker in speakers]].astype(np.float64)


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
    from scipy import stats  # takes a second

    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    ours, theirs = pairs[True, False], pairs[False, True]
    return ours, theirs, float(stats.binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0


# ----------------------------------------------------------------------------------------------------------------------
# The lines of a predictions file


def scorings(records):
    """Which scorings of APA a predictions file holds."""
    apa = [record for record in records if record["task"] == "APA"]
    expected = bool(apa) and all("scores" in record for record in apa)
    greedy = not expected or all("tokens" in record for record in apa)
    return [name for name, held in zip(SCORINGS, (greedy, expected)) if held]


def paired(records, scoring="greedy"):
    """Outputs with their references, as `summarise` takes them: apa, mdd."""
    apa, mdd = [], []
    for record in records:
        if record["task"] == "APA" and scoring == "expected":
            output = {name: expectation(probabilities) for name, probabilities in record["scores"].items()}
        else:
            output = parse_output(record["task"], record["output"])
        (apa if record["task"] == "APA" else mdd).append((output, record["reference"]))
    return apa, mdd


def score(records, scoring="greedy"):
    """Numbers, and the reasons of missing ones: those of `summarise`, shares of cut-off outputs, and `utterances`."""
    numbers, reasons = summarise(*paired(records, scoring))
    for task in TASKS:
        cut = [record["truncated"] for record in records if record["task"] == task and "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = sum(cut) / len(cut) if cut else math.nan
    numbers["utterances"] = len({record["id"] for record in records})
    return numbers, reasons


def resamples(records, scoring="greedy"):
    """`resample` of a predictions file; empty where it does not name two speakers or more."""
    speakers = [[record.get("speaker") for record in records if record["task"] == task] for task in TASKS]
    named = {*speakers[0], *speakers[1]}
    return {} if None in named or len(named) < 2 else resample(*paired(records, scoring), *speakers)


def intervals(records, scoring="greedy"):
    """{key: (low, high)} of a predictions file; empty where it does not name two speakers or more."""
    return {key: interval(samples) for key, samples in resamples(records, scoring).items()}
