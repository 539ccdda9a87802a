"""What each number means, and how sure it is. Text in, numbers out; no model, no torch.

Error rates are fractions (0.114, not 11.4 %). Each utterance is counted once, its counts are one row. A number is a
function of the rows of a corpus: of their sums, never of averages of utterances; correlations are over utterances. Its
interval is the same function of rows that other speakers might have given, see `bootstrap`.

There are two F1s, because the paper's definition (4.3) and its figures (Table 3) do not describe the same number:

    detection F1        mispronunciations found, the convention of the field (Kaldi-style scoring, `phone_columns`)
    phone agreement F1  position-by-position agreement of two phone strings, weighted over phones (`phone_agreement`).
                        Random errors put into the test labels at a PER of 0.11 give 0.56 where they are spread evenly
                        and 0.77 where they gather in a third of the utterances; the paper has 0.724 at 0.114
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import math
import re

import numpy as np

from prompts import SCORES, TASKS, parse_output

RESAMPLES = 1000  # of the bootstrap
LEVEL = 0.95  # of its intervals
SAME = 1e-6  # score points: a smaller standard deviation is what rounding leaves of equal scores
SCORINGS = ("greedy", "expected")  # of APA: the written answer (the paper's), the mean of each score's distribution
EVENTS = ("true_accept", "false_reject", "false_accept", "correct_diagnosis", "diagnosis_error")
KINDS = ("same", "substituted", "missing", "added")  # of an aligned pair
RIGHT = ("true_accept", "correct_diagnosis", "diagnosis_error")  # detection decided well; diagnosis is another matter


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, nan where the denominator is zero."""
    return float(numerator / denominator) if denominator else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def correlation(predicted: Sequence[float], human: Sequence[float]) -> tuple[float, float, float, str | None]:
    """Pearson correlation, its two-sided p-value, and the mean absolute error in score points (0-10).

    Returns (pcc, pvalue, mae, reason). Where the correlation does not exist, pcc and pvalue are nan and `reason`
    says why; otherwise it is None.
    """
    from scipy import stats  # takes a second

    numbers, n = score_numbers(np.array(predicted, float), np.array(human, float)), len(human)
    pcc, mae = numbers["pcc"], numbers["mae"]
    if not math.isnan(pcc):
        return pcc, float(stats.pearsonr(predicted, human).pvalue), mae, None
    if n < 3:
        return pcc, math.nan, mae, f"only {n} utterances" if n else "no scores"
    name, values = ("predicted", predicted) if np.std(predicted) <= SAME else ("human", human)
    return pcc, math.nan, mae, f"all {n} {name} scores are {values[0]:g}"


def score_numbers(predicted: np.ndarray, human: np.ndarray) -> dict[str, float]:
    """Numbers of (N,) predicted and (N,) human scores.

    pcc and spearman, correlations of the scores and of their ranks; sd_ratio, the standard deviation of the predicted
    scores over that of the human ones; mae, the mean absolute difference. The first three are nan for less than three
    utterances, and where scores do not vary: either for a correlation, the human ones for the ratio.
    """
    from scipy import stats  # takes a second

    numbers = dict.fromkeys(("pcc", "spearman", "sd_ratio"), math.nan)
    numbers["mae"] = ratio(abs(predicted - human).sum(), len(human))
    if len(human) >= 3 and human.std() > SAME:
        numbers["sd_ratio"] = ratio(predicted.std(), human.std())
        if predicted.std() > SAME:
            ranks = stats.rankdata(predicted), stats.rankdata(human)
            numbers["pcc"], numbers["spearman"] = (float(np.corrcoef(*of)[0, 1]) for of in ((predicted, human), ranks))
    return numbers


def expectation(probabilities: list[float]) -> float:
    """The mean score of a distribution over the values 0, 1, 2, ..."""
    return sum(value * probability for value, probability in enumerate(probabilities))


# ----------------------------------------------------------------------------------------------------------------------
# Words and phones


def normalise_words(text: str) -> list[str]:
    """Words as they are compared: upper case, no punctuation other than apostrophes inside a word."""
    words = re.sub(r"[^\w']|_", " ", text.replace("’", "'").upper()).split()
    return [word for word in (word.strip("'") for word in words) if word]


def normalise_phones(text: str) -> list[str]:
    """Phones as they are compared: upper case, stress digits removed; `<unk>` and starred phones stay themselves."""
    phones = [re.sub(r"\d", "", phone.upper()) for phone in text.split()]
    return ["<unk>" if phone == "<UNK>" else phone for phone in phones if phone]


def error_counts(references: list[list[str]], hypotheses: list[list[str]]) -> np.ndarray:
    """Substitutions, deletions, insertions and reference length of each of N utterances, (N, 4), by jiwer's alignment.

    Both are lists with one list of words per utterance.
    """
    import jiwer

    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        found = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        counts.append((found.substitutions, found.deletions, found.insertions, len(reference)))
    return np.array(counts, dtype=float).reshape(-1, 4)


def error_rate(references: list[list[str]], hypotheses: list[list[str]]) -> float:
    """(substitutions + deletions + insertions) / reference length (paper 4.3); nan when the references hold nothing."""
    *errors, length = error_counts(references, hypotheses).sum(axis=0)
    return ratio(sum(errors), length)


def align(first: list[str], second: list[str]) -> list[tuple[str | None, str | None]]:
    """The edit-distance alignment of two phone strings, as pairs; None stands for a gap.

    Unit costs. Where several alignments cost the same, the traceback from the end takes a match or substitution if
    it is no worse than both others, else a gap in `second` (a deletion) if no worse than a gap in `first`: the rule
    of Kaldi's `align-text`, on which published detection figures rest.
    """
    return [(_item(first, i), _item(second, j)) for i, j in _alignment(first, second)]


def _item(phones: list[str], index: int | None) -> str | None:
    return None if index is None else phones[index]


def _alignment(first: list[str], second: list[str]) -> list[tuple[int | None, int | None]]:
    """`align`, as indices."""
    if first == second:  # most of what learners say, and an answer to it
        return [(i, i) for i in range(len(first))]
    cost = [list(range(len(second) + 1))]
    for i, phone in enumerate(first, 1):
        above, row = cost[-1], [i]
        for other, corner, top in zip(second, above, above[1:]):
            row.append(corner if phone == other else 1 + min(corner, top, row[-1]))
        cost.append(row)
    pairs = []
    i, j = len(first), len(second)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (first[i - 1] != second[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1]


def kind_of(first: str | None, second: str | None) -> str:
    """What an aligned pair is, one of KINDS: the same, or by `second` substituted, missing or added; None: a gap."""
    if first is None:
        return "added"
    return "missing" if second is None else "same" if first == second else "substituted"


def phone_columns(canonical: list[str], heard: list[str], written: list[str]) -> list[tuple[str | None, ...]]:
    """What should be said, what raters heard and what the model wrote of one utterance, under each other.

    A list of (canonical, heard, written, event), None for a gap; the event, one of EVENTS, is what became of the phone.
    Three alignments decide: canonical-heard says what was mispronounced, heard-written whether the model heard the
    same, canonical-written what became of phones the speaker left out. The positive class is a mispronunciation; a
    wrong diagnosis is still a detection. Phones that only the model has are no event, None: they count in the PER
    alone. This is the scoring of the CTC-Attention-Mispronunciation and HMamba recipes.

        canonical  DH AH K AE T
        heard      D  AH K AE      (DH said as D, T left out)
        written    D  AH G AE T    -> D: correct diagnosis; AH, AE: true accepts; G: a false reject; T: a false accept

    The columns with an event, and their order, depend on canonical and heard alone, so those of two systems can be
    paired. Each written phone stands once; one under a heard phone may have decided about one left out beside it.
    """
    required, answered, extra = dict(_alignment(canonical, written)), [], {}
    for j, k in _alignment(heard, written):
        if j is None:
            extra[k] = len(answered)  # heard phones before it
        else:
            answered.append(k)
    columns, spoken, shown = [], 0, 0
    for i, j in _alignment(canonical, heard):
        k = required[i] if j is None else answered[j]
        phones = _item(canonical, i), _item(heard, j), _item(written, k)
        event, beside = _event(*phones), j is None and extra.get(k) != spoken  # then k is under a heard phone, or None
        if k is not None and not beside:
            columns += [(None, None, other, None) for other in written[shown:k]]
            shown = k + 1
        columns.append((*phones[:2], None if beside else phones[2], event))
        spoken += j is not None
    return columns + [(None, None, other, None) for other in written[shown:]]


def _event(canonical: str | None, heard: str | None, written: str | None) -> str:
    if canonical == heard:
        return "true_accept" if written == heard else "false_reject"
    if written == heard:
        return "correct_diagnosis"
    # writing the canonical phone, or nothing for an added one, is what a correct speaker would get
    return "false_accept" if written == canonical else "diagnosis_error"


def detection_counts(canonical: list[list[str]], heard: list[list[str]], predicted: list[list[str]]) -> dict[str, int]:
    """How often each of EVENTS is in the `phone_columns` of a corpus: lists with one list of phones per utterance."""
    columns = map(phone_columns, canonical, heard, predicted)
    found = Counter(event for utterance in columns for *_, event in utterance)
    return {name: found[name] for name in EVENTS}


def detection_scores(counts: dict[str, int]) -> dict[str, float]:
    """Detection and diagnosis from pooled counts; nan where a denominator is zero.

    With detected = correct_diagnosis + diagnosis_error:
        precision = detected / (detected + false_reject)        recall = detected / (detected + false_accept)
        far, false acceptance = false_accept / mispronounced = 1 - recall
        frr, false rejection = false_reject / phones said right
        der, diagnosis error = diagnosis_error / detected
    """
    detected = counts["correct_diagnosis"] + counts["diagnosis_error"]
    wrong, missed = counts["false_reject"], counts["false_accept"]
    return {
        "precision": ratio(detected, detected + wrong),
        "recall": ratio(detected, detected + missed),
        "f1": ratio(2 * detected, 2 * detected + wrong + missed),
        "far": ratio(missed, detected + missed),
        "frr": ratio(wrong, wrong + counts["true_accept"]),
        "der": ratio(counts["diagnosis_error"], detected),
    }


def phone_agreement(heard: np.ndarray, written: np.ndarray, agreed: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of phones by position, weighted over phones by how often they were heard.

    Position i of one string is compared with position i of the other, without alignment; one-vs-rest scores of each
    phone are averaged with its frequency among the heard ones as weight (0 for a phone that is never written). Not
    the field's convention: reported because the paper's Table 3 fits it.
    heard, written, agreed: how often each of P phones was heard, written, and both in one position, (P,).
    """
    heard, written, agreed = (counts[heard > 0] for counts in (heard, written, agreed))
    parts = {
        "precision": agreed / np.maximum(written, 1),
        "recall": agreed / heard,
        "f1": 2 * agreed / (heard + written),
    }
    return {key: ratio((heard * values).sum(), heard.sum()) for key, values in parts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# All numbers of an evaluation


def assessment_rows(apa: list) -> np.ndarray:
    """Predicted and human SCORES of each of N utterances, (N, 2, 4); nan for predicted ones that were not parsed.

    apa: (parsed scores or None, human scores) of each utterance.
    """
    absent = dict.fromkeys(SCORES, math.nan)
    rows = [[[scores[name] for name in SCORES] for scores in (said or absent, human)] for said, human in apa]
    return np.array(rows, float).reshape(-1, 2, len(SCORES))


def assessment(rows: np.ndarray) -> dict[str, float]:
    """The numbers of scores, by key; unparsed outputs leave them, and their share stands beside them."""
    read = _parsed(rows)
    numbers = {"apa_unparsed": ratio(len(rows) - len(read), len(rows))}
    for i, name in enumerate(SCORES):
        numbers |= {f"{name}_{key}": value for key, value in score_numbers(*read[..., i].T).items()}
    return numbers


def _parsed(rows: np.ndarray) -> np.ndarray:
    return rows[~np.isnan(rows[:, 0, 0])]


def phones_of(mdd: list) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Phones of each utterance, three lists: what should be said, what raters heard, what the model wrote."""
    canonical, heard = ([reference[key] for _, reference in mdd] for key in ("canonical", "heard"))
    return canonical, heard, [normalise_phones(output["phoneme_transcript"]) if output else [] for output, _ in mdd]


def diagnosis_rows(mdd: list) -> np.ndarray:
    """What is counted in each of N utterances, (N, 14 + 3 P), where P is how many phones were heard in all of them.

    Whether the output was not parsed; of words and of phones substitutions, deletions, insertions and reference length;
    EVENTS; of each of P phones how often it was heard, then written, then both in one position.
    mdd: (parsed transcripts or None, reference with word_transcript, canonical, heard) of each utterance; an unparsed
    output counts as an empty transcript.
    """
    canonical, heard, written = phones_of(mdd)
    spoken = [normalise_words(reference["word_transcript"]) for _, reference in mdd]
    words = [normalise_words(output["word_transcript"]) if output else [] for output, _ in mdd]
    kinds = [[kind_of(*pair) for pair in align(*phones)] for phones in zip(heard, written)]
    events = [[event for *_, event in phone_columns(*phones)] for phones in zip(canonical, heard, written)]
    agreed = [[a for a, b in zip(*phones) if a == b] for phones in zip(heard, written)]
    names = sorted({phone for phones in heard for phone in phones})
    return np.column_stack(
        [
            [output is None for output, _ in mdd],
            error_counts(spoken, words),
            _counts(kinds, KINDS[1:]),
            [len(phones) for phones in heard],
            _counts(events, EVENTS),
            *(_counts(phones, names) for phones in (heard, written, agreed)),
        ]
    )


def _counts(items: list[list[str]], names: Sequence[str]) -> np.ndarray:
    """How often each of K names is among the items of each of N utterances, (N, K)."""
    found = [[counter[name] for name in names] for counter in map(Counter, items)]
    return np.array(found, float).reshape(len(items), len(names))


def diagnosis(rows: np.ndarray) -> dict[str, float]:
    """The numbers of words and phones, by key; those of EVENTS are whole."""
    (unparsed,), words, phones, events, agreement = np.split(rows.sum(axis=0), [1, 5, 9, 14])
    numbers = {"mdd_unparsed": ratio(unparsed, len(rows))}
    for name, (*errors, length) in (("wer", words), ("per", phones)):
        numbers[name] = ratio(sum(errors), length)
        numbers |= {f"{name}_{kind}": ratio(n, length) for kind, n in zip(("sub", "del", "ins"), errors)}
    counts = dict(zip(EVENTS, map(int, events)))
    numbers |= {f"detection_{key}": value for key, value in detection_scores(counts).items()} | counts
    agreement = phone_agreement(*agreement.reshape(3, -1))
    return numbers | {f"phone_agreement_{key}": value for key, value in agreement.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty: other speakers might have been recorded


def bootstrap(
    numbers_of: Callable[[np.ndarray], dict[str, float]],
    rows: np.ndarray,
    speakers: Sequence[str],
    names: Iterable[str],
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The numbers of RESAMPLES corpora of as many speakers, drawn with replacement, (RESAMPLES,) by key.

    Speakers, not utterances, are drawn: those of one speaker resemble each other, and counting them as independent
    would make intervals too narrow. speakers: of each row; names: all that are drawn from.
    The draws depend on the set of names and the seed alone, so two systems' numbers can be subtracted from each other.
    """
    place = {name: i for i, name in enumerate(sorted(set(names)))}
    column, rng = [place[speaker] for speaker in speakers], np.random.default_rng(seed)
    draws = rng.multinomial(len(place), np.full(len(place), 1 / len(place)), size=RESAMPLES)  # (RESAMPLES, names)
    found = [numbers_of(rows.repeat(times[column], axis=0)) for times in draws]
    return {key: np.array([numbers[key] for numbers in found]) for key in found[0]}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Percentile interval at LEVEL, (low, high); nan where most resamples have no such number."""
    samples = samples[np.isfinite(samples)]
    if len(samples) < RESAMPLES / 2:
        return math.nan, math.nan
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_pvalue(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of a difference: how often resamples have it on either side of zero.

    It is never below 2 / resamples: so many cannot tell a smaller one.
    """
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return math.nan
    side = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return float(min(1.0, max(2 * side, 2 / len(differences))))


def mcnemar(first: Iterable, second: Iterable) -> tuple[int, int, float]:
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


def scorings(records: list[dict]) -> list[str]:
    """Which scorings of APA a predictions file holds."""
    apa = [record for record in records if record["task"] == "APA"]
    expected = bool(apa) and all("scores" in record for record in apa)
    greedy = not expected or all("tokens" in record for record in apa)
    return [name for name, held in zip(SCORINGS, (greedy, expected)) if held]


def paired(records: list[dict], scoring: str = "greedy") -> tuple[list, list]:
    """Outputs with their references, as `assessment_rows` and `diagnosis_rows` take them: apa, mdd."""
    apa, mdd = [], []
    for record in records:
        if record["task"] == "APA" and scoring == "expected":
            output = {name: expectation(probabilities) for name, probabilities in record["scores"].items()}
        else:
            output = parse_output(record["task"], record["output"])
        (apa if record["task"] == "APA" else mdd).append((output, record["reference"]))
    return apa, mdd


def score(records: list[dict], scoring: str = "greedy") -> tuple[dict, dict]:
    """All numbers of a predictions file with flat keys, and by key the reason why a correlation is nan.

    Beside those of `assessment` and `diagnosis`: p-values, shares of outputs that were cut off, and `utterances`.
    """
    apa, mdd = paired(records, scoring)
    scores, reasons = assessment_rows(apa), {}
    numbers = assessment(scores) | diagnosis(diagnosis_rows(mdd))
    for name, (predicted, human) in zip(SCORES, np.moveaxis(_parsed(scores), 0, 2).swapaxes(0, 1)):
        _, numbers[f"{name}_pvalue"], _, reason = correlation(predicted, human)
        if reason:
            reasons[f"{name}_pcc"] = reason if len(human) or not apa else f"none of {len(apa)} outputs could be parsed"
    for task in TASKS:
        cut = [record["truncated"] for record in records if record["task"] == task and "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = ratio(sum(cut), len(cut))
    numbers["utterances"] = len({record["id"] for record in records})
    return numbers, reasons


def resamples(records: list[dict], scoring: str = "greedy") -> dict[str, np.ndarray]:
    """The numbers in corpora of other speakers, (RESAMPLES,) by key; empty where less than two speakers are named."""
    speakers = [[record.get("speaker") for record in records if record["task"] == task] for task in TASKS]
    named = {*speakers[0], *speakers[1]}
    if None in named or len(named) < 2:
        return {}
    (apa, mdd), (of_apa, of_mdd) = paired(records, scoring), speakers
    found = bootstrap(assessment, assessment_rows(apa), of_apa, named)
    found |= bootstrap(diagnosis, diagnosis_rows(mdd), of_mdd, named)
    return {key: values for key, values in found.items() if key not in EVENTS}  # these grow with a corpus


def intervals(records: list[dict], scoring: str = "greedy") -> dict[str, tuple[float, float]]:
    """{key: (low, high)} of a predictions file; empty where it does not name two speakers or more."""
    return {key: interval(samples) for key, samples in resamples(records, scoring).items()}
