"""What each number means, and how sure it is. Text in, numbers out; no model, no torch.

Error rates are fractions (0.114, not 11.4 %). Everything that counts errors is pooled over the corpus: sums of counts
are divided, utterances are never averaged. Correlations are over utterances.

Each utterance is counted once: a row. A number is a function of the rows of a corpus, its interval comes from the same
function of the rows of other speakers, see `bootstrap`.

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


def correlation(predicted: np.ndarray, human: np.ndarray) -> tuple[float, float, str | None]:
    """Pearson correlation of (N,) scores, its two-sided p-value, None; or nan, nan, and why there is none."""
    from scipy import stats  # takes a second

    n = len(human)
    if n < 3:
        return math.nan, math.nan, f"only {n} utterances" if n else "no scores"
    for name, values in (("predicted", predicted), ("human", human)):
        if values.std() <= SAME:
            return math.nan, math.nan, f"all {n} {name} scores are {values[0]:g}"
    pcc, pvalue = stats.pearsonr(predicted, human)
    return float(pcc), float(pvalue), None


def score_numbers(predicted: np.ndarray, human: np.ndarray) -> dict[str, float]:
    """Numbers of (N,) predicted and (N,) human scores.

    pcc and spearman, correlations of the scores and of their ranks; sd_ratio, the standard deviation of the predicted
    scores over that of the human ones; mae, the mean absolute difference. The first three are nan for less than three
    utterances, and where scores do not vary: either for a correlation, the human ones for the ratio.
    """
    from scipy import stats  # takes a second

    numbers = dict.fromkeys(("pcc", "spearman", "sd_ratio"), math.nan)
    numbers["mae"] = ratio(abs(predicted - human).sum(), len(human))
    if len(human) >= 3:
        sd, human_sd = predicted.std(), human.std()
        if human_sd > SAME:
            numbers["sd_ratio"] = float(sd / human_sd)
        if min(sd, human_sd) > SAME:
            found = np.corrcoef([predicted, human, *stats.rankdata([predicted, human], axis=1)])
            numbers |= {"pcc": float(found[0, 1]), "spearman": float(found[2, 3])}
    return numbers


def expectation(probabilities: Sequence[float]) -> float:
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
    if first == second:  # most of what learners say, and an answer to it
        return list(zip(first, second))
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
            pairs.append((first[i], second[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((first[i], None))
        else:
            j -= 1
            pairs.append((None, second[j]))
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
    paired. Each written phone stands once, under a phone left out only where it comes next: the one that decided may
    stand elsewhere.
    """
    required = [answer for phone, answer in align(canonical, written) if phone is not None]
    columns, answers = [], align(heard, written)
    for phone, perceived in align(canonical, heard):
        answer = None if phone is None else required.pop(0)
        if perceived is not None:
            while answers[0][0] is None:
                columns.append((None, *answers.pop(0), None))
            answer = answers[0][1]
        event = _event(phone, perceived, answer)
        next_is_it = answers[:1] == [(perceived, answer)]  # always, where a phone was heard
        columns.append((phone, perceived, answers.pop(0)[1] if next_is_it else None, event))
    return columns + [(None, *pair, None) for pair in answers]


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
    total = heard.sum()
    return {
        "precision": ratio((heard * agreed / np.maximum(written, 1)).sum(), total),
        "recall": ratio(agreed.sum(), total),
        "f1": ratio((heard * 2 * agreed / np.maximum(heard + written, 1)).sum(), total),
    }


# ----------------------------------------------------------------------------------------------------------------------
# All numbers of an evaluation


def answer_of(record: dict, scoring: str = "greedy") -> dict | None:
    """What a line of a predictions file says, scores or transcripts by name; None for what cannot be parsed."""
    if record["task"] == "APA" and scoring == "expected":
        return {name: expectation(probabilities) for name, probabilities in record["scores"].items()}
    return parse_output(record["task"], record["output"])


def assessment_rows(records: list[dict], scoring: str = "greedy") -> np.ndarray:
    """Predicted and human SCORES of each of N APA lines, (N, 2, 4); nan for predicted ones that cannot be parsed."""
    unparsed = dict.fromkeys(SCORES, math.nan)
    pairs = [(answer_of(line, scoring) or unparsed, line["reference"]) for line in records if line["task"] == "APA"]
    rows = [[[scores[name] for name in SCORES] for scores in pair] for pair in pairs]
    return np.array(rows, float).reshape(-1, 2, len(SCORES))


def parsed(rows: np.ndarray) -> np.ndarray:
    """Those of `assessment_rows` with predicted scores."""
    return rows[~np.isnan(rows[:, 0, 0])]


def assessment(rows: np.ndarray) -> dict[str, float]:
    """The numbers of scores, by key; unparsed outputs leave them, and their share stands beside them."""
    read = parsed(rows)
    numbers = {"apa_unparsed": ratio(len(rows) - len(read), len(rows))}
    for name, pair in zip(SCORES, read.T.copy()):  # faster than a view
        numbers |= {f"{name}_{key}": value for key, value in score_numbers(*pair).items()}
    return numbers


def phones_of(records: list[dict]) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Phones of each MDD line as they are compared: what should be said, what raters heard, what the model wrote."""
    mdd = [(line["reference"], answer_of(line)) for line in records if line["task"] == "MDD"]
    canonical, heard = ([normalise_phones(" ".join(said[key])) for said, _ in mdd] for key in ("canonical", "heard"))
    return canonical, heard, [normalise_phones(said["phoneme_transcript"]) if said else [] for _, said in mdd]


def diagnosis_rows(records: list[dict]) -> np.ndarray:
    """Counts of each of N MDD lines, (N, 14 + 3 P); a transcript that cannot be parsed counts as empty.

    Whether it cannot be parsed; substitutions, deletions, insertions and reference length of the words, then of the
    phones; EVENTS; how often each of P phones was heard, then written, then both in one position. The P phones are
    those that were heard in any of the lines.
    """
    mdd = [(line["reference"], answer_of(line)) for line in records if line["task"] == "MDD"]
    spoken = [normalise_words(reference["word_transcript"]) for reference, _ in mdd]
    words = [normalise_words(said["word_transcript"]) if said else [] for _, said in mdd]
    canonical, heard, written = phones_of(records)
    columns = list(map(phone_columns, canonical, heard, written))
    kinds = [[kind_of(*pair) for _, *pair, _ in utterance if pair != [None, None]] for utterance in columns]
    events = [[event for *_, event in utterance] for utterance in columns]
    agreed = [[a for a, b in zip(*phones) if a == b] for phones in zip(heard, written)]
    names = sorted({phone for phones in heard for phone in phones})
    parts = [[said is None for _, said in mdd], error_counts(spoken, words)]
    parts += [_counts(kinds, KINDS[1:]), list(map(len, heard)), _counts(events, EVENTS)]
    return np.column_stack(parts + [_counts(phones, names) for phones in (heard, written, agreed)])


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


def bootstrap(numbers_of: Callable, rows: np.ndarray, speakers: list[str], names: Iterable[str], seed: int = 0) -> dict:
    """The numbers of RESAMPLES corpora of as many speakers, drawn with replacement, (RESAMPLES,) by key.

    Speakers, not utterances, are drawn: those of one speaker resemble each other, and counting them as independent
    would make intervals too narrow. The draws depend on the set of names and the seed alone, so two systems' numbers
    can be subtracted from each other.
    numbers_of: rows -> numbers by key. speakers: of each row. names: all that are drawn from.
    """
    place = {name: i for i, name in enumerate(sorted(set(names)))}
    column, rng = np.array([place[speaker] for speaker in speakers], int), np.random.default_rng(seed)
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


def score(
    records: list[dict], scoring: str = "greedy", resample: bool = False
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, str]]:
    """All numbers of a predictions file with flat keys; by key those of other speakers; why a correlation is nan.

    Beside those of `assessment` and `diagnosis`: p-values, shares of outputs that were cut off, and `utterances`.
    resample: for (RESAMPLES,) numbers in corpora of other speakers; none where less than two speakers are named.
    """
    apa, mdd = assessment_rows(records, scoring), diagnosis_rows(records)
    numbers, samples, reasons = assessment(apa) | diagnosis(mdd), {}, {}
    speakers = [[record.get("speaker") for record in records if record["task"] == task] for task in TASKS]
    named = {*speakers[0], *speakers[1]}
    if resample and None not in named and len(named) > 1:
        samples = bootstrap(assessment, apa, speakers[0], named) | bootstrap(diagnosis, mdd, speakers[1], named)
    read = parsed(apa)
    for name, pair in zip(SCORES, read.T):
        _, numbers[f"{name}_pvalue"], reason = correlation(*pair)
        if reason:
            missing = len(apa) and not len(read)
            reasons[f"{name}_pcc"] = f"none of {len(apa)} outputs could be parsed" if missing else reason
    for task in TASKS:
        cut = [record["truncated"] for record in records if record["task"] == task and "truncated" in record]
        numbers[f"{task.lower()}_truncated"] = ratio(sum(cut), len(cut))
    numbers["utterances"] = len({record["id"] for record in records})
    samples = {key: values for key, values in samples.items() if key not in EVENTS}  # these grow with a corpus
    return numbers, samples, reasons
