import functools
import math
import random

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support

import metrics


def strings(seed, number, alphabet="ABCDE", longest=9):
    draw = random.Random(seed)
    return [[draw.choice(alphabet) for _ in range(draw.randint(0, longest))] for _ in range(number)]


# ----------------------------------------------------------------------------------------------------------------------
# Alignment


def distance(first, second):
    """Levenshtein distance by its recursive definition."""

    @functools.cache
    def from_(i, j):
        if i == len(first) or j == len(second):
            return len(first) - i + len(second) - j
        return min(from_(i + 1, j + 1) + (first[i] != second[j]), from_(i + 1, j) + 1, from_(i, j + 1) + 1)

    return from_(0, 0)


def test_an_alignment_holds_both_sequences_and_costs_their_distance():
    for first, second in zip(strings(1, 200), strings(2, 200)):
        pairs = metrics.align(first, second)
        assert [a for a, _ in pairs if a is not None] == first
        assert [b for _, b in pairs if b is not None] == second
        assert sum(a != b for a, b in pairs) == distance(first, second)


def test_ties_are_broken_from_the_end_substitution_first_then_deletion():
    assert metrics.align("A", "BA") == [(None, "B"), ("A", "A")]
    assert metrics.align("AB", "C") == [("A", None), ("B", "C")]
    assert metrics.align("A", "BC") == [(None, "B"), ("A", "C")]
    # cost 2 also as two substitutions of a shifted string: a match at the end wins over either
    assert metrics.align("ABC", "BCC") == [("A", "B"), ("B", "C"), ("C", "C")]
    # deletion before insertion, read from the end
    assert metrics.align("XAY", "AYX") == [("X", None), ("A", "A"), ("Y", "Y"), (None, "X")]


# ----------------------------------------------------------------------------------------------------------------------
# Error rates


def test_error_rates_are_pooled_over_the_corpus_not_averaged():
    references, hypotheses = [["A"], ["A", "B", "C"]], [["X"], ["A", "B", "C"]]
    assert metrics.error_rate(references, hypotheses) == 1 / 4


def test_an_empty_transcript_counts_every_reference_phone_as_an_error():
    assert metrics.error_rate([["A", "B"], ["C"]], [[], ["C"]]) == 2 / 3


def test_error_rate_equals_the_alignment():
    references, hypotheses = strings(3, 100), strings(4, 100)
    errors = sum(a != b for r, h in zip(references, hypotheses) for a, b in metrics.align(r, h))
    assert metrics.error_rate(references, hypotheses) == pytest.approx(errors / sum(map(len, references)))


def test_error_rate_of_nothing_is_nan():
    assert math.isnan(metrics.error_rate([[]], [["A"]]))


@pytest.mark.parametrize(
    "text, words",
    [
        ("That's an interesting observation.", ["THAT'S", "AN", "INTERESTING", "OBSERVATION"]),
        ("  'Hello,' she said -- well-known ", ["HELLO", "SHE", "SAID", "WELL", "KNOWN"]),
        ("that’s", ["THAT'S"]),
        ("?!", []),
    ],
)
def test_words_are_compared_in_upper_case_without_punctuation(text, words):
    assert metrics.normalise_words(text) == words


def test_phones_are_compared_without_case_and_stress_but_keep_their_marks():
    assert metrics.normalise_phones("dh AH0 <unk> <UNK> r* EY2 1") == ["DH", "AH", "<unk>", "<unk>", "R*", "EY"]


# ----------------------------------------------------------------------------------------------------------------------
# Detection


def operations(first, second):
    """Per item of `first`: C, S or D and what it became; and per item of `second`: C, S or I and what it was."""
    of_first, of_second = [], []
    for a, b in metrics.align(first, second):
        operation = "I" if a is None else "D" if b is None else "C" if a == b else "S"
        if a is not None:
            of_first.append((operation, b))
        if b is not None:
            of_second.append((operation, a))
    return of_first, of_second


def counts_by_the_published_rules(canonical, heard, predicted):
    """The rules as the Kaldi-style script states them, on operation letters."""
    count = dict.fromkeys(("true_accept", "false_reject", "false_accept", "correct_diagnosis", "diagnosis_error"), 0)
    a1_canonical, a1_heard = operations(canonical, heard)
    a2_heard, _ = operations(heard, predicted)
    a3_canonical, _ = operations(canonical, predicted)
    for (a1, _), (a3, _) in zip(a1_canonical, a3_canonical):
        if a1 == "D":
            count[{"D": "correct_diagnosis", "S": "diagnosis_error", "C": "false_accept"}[a3]] += 1
    for (a1, phone), (a2, written) in zip(a1_heard, a2_heard):
        if a1 == "C":
            count["true_accept" if a2 == "C" else "false_reject"] += 1
        elif a1 == "S":
            if a2 == "C":
                count["correct_diagnosis"] += 1
            else:
                count["false_accept" if written == phone else "diagnosis_error"] += 1
        else:
            count[{"C": "correct_diagnosis", "S": "diagnosis_error", "D": "false_accept"}[a2]] += 1
    return count


def test_detection_follows_the_published_rules_on_random_strings():
    for canonical, heard, predicted in zip(strings(5, 500), strings(6, 500), strings(7, 500)):
        expected = counts_by_the_published_rules(canonical, heard, predicted)
        assert metrics.detection_counts([canonical], [heard], [predicted]) == expected


@pytest.mark.parametrize(
    "canonical, heard, predicted, expected",
    [
        ("A B C", "A B C", "A B C", {"true_accept": 3}),
        ("A B C", "A X C", "A X C", {"true_accept": 2, "correct_diagnosis": 1}),
        ("A B C", "A X C", "A Y C", {"true_accept": 2, "diagnosis_error": 1}),
        ("A B C", "A X C", "A B C", {"true_accept": 2, "false_accept": 1}),
        ("A B C", "A X C", "A C", {"true_accept": 2, "diagnosis_error": 1}),
        ("A B C", "A B C", "A X C", {"true_accept": 2, "false_reject": 1}),
        ("A B C", "A B C", "A C", {"true_accept": 2, "false_reject": 1}),
        ("A B C", "A C", "A C", {"true_accept": 2, "correct_diagnosis": 1}),
        ("A B C", "A C", "A B C", {"true_accept": 2, "false_accept": 1}),
        ("A B C", "A C", "A X C", {"true_accept": 2, "diagnosis_error": 1}),
        ("A C", "A B C", "A B C", {"true_accept": 2, "correct_diagnosis": 1}),
        ("A C", "A B C", "A X C", {"true_accept": 2, "diagnosis_error": 1}),
        ("A C", "A B C", "A C", {"true_accept": 2, "false_accept": 1}),
        ("A C", "A C", "A B C", {"true_accept": 2}),  # what only the model has counts nowhere
        (
            "DH AH K AE T",
            "D AH K AE",
            "D AH G AE T",
            {"true_accept": 2, "false_reject": 1, "correct_diagnosis": 1, "false_accept": 1},
        ),
        ("A <unk>", "A <unk>", "A B", {"true_accept": 1, "false_reject": 1}),  # <unk> equals no phone but itself
        ("R", "R*", "R", {"false_accept": 1}),  # nor does a starred phone equal its plain one
    ],
)
def test_detection_of_worked_cases(canonical, heard, predicted, expected):
    counts = metrics.detection_counts([canonical.split()], [heard.split()], [predicted.split()])
    assert {key: value for key, value in counts.items() if value} == expected


def test_detection_counts_are_pooled_over_utterances():
    canonical, heard, predicted = strings(8, 20), strings(9, 20), strings(10, 20)
    single = [metrics.detection_counts([c], [h], [p]) for c, h, p in zip(canonical, heard, predicted)]
    pooled = metrics.detection_counts(canonical, heard, predicted)
    assert pooled == {key: sum(count[key] for count in single) for key in pooled}


def test_a_wrong_diagnosis_is_still_a_detection():
    counts = dict(true_accept=90, false_reject=2, false_accept=4, correct_diagnosis=3, diagnosis_error=3)
    assert metrics.detection_scores(counts) == {
        "precision": 6 / 8,
        "recall": 6 / 10,
        "f1": 12 / 18,
        "far": 4 / 10,
        "frr": 2 / 92,
        "der": 3 / 6,
    }


def test_copying_the_canonical_phones_has_recall_0_and_no_precision():
    canonical, heard = strings(11, 30), strings(12, 30)
    scores = metrics.detection_scores(metrics.detection_counts(canonical, heard, canonical))
    assert scores["recall"] == 0 and scores["f1"] == 0 and math.isnan(scores["precision"])


# ----------------------------------------------------------------------------------------------------------------------
# Phone agreement


def test_phone_agreement_equals_sklearns_weighted_scores_by_position():
    heard, predicted = strings(13, 50), strings(14, 50)
    pairs = []
    for h, p in zip(heard, predicted):
        length = max(len(h), len(p))
        pairs += zip(h + ["-"] * (length - len(h)), p + ["-"] * (length - len(p)))
    labels = sorted({phone for utterance in heard for phone in utterance})
    precision, recall, f1, _ = precision_recall_fscore_support(
        *zip(*pairs), labels=labels, average="weighted", zero_division=0
    )
    assert metrics.phone_agreement(heard, predicted) == pytest.approx(
        {"precision": precision, "recall": recall, "f1": f1}
    )


def test_one_inserted_phone_shifts_all_that_follows_in_agreement_but_costs_one_error():
    heard, predicted = [list("ABCDEFGH")], [list("XABCDEFGH")]
    assert metrics.phone_agreement(heard, predicted)["recall"] == 0
    assert metrics.error_rate(heard, predicted) == 1 / 8


def test_agreement_of_equal_strings_is_1():
    assert metrics.phone_agreement(strings(15, 5), strings(15, 5)) == {"precision": 1, "recall": 1, "f1": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Correlation and summary


def test_correlation_and_error_equal_scipy_and_numpy():
    rng = np.random.default_rng(0)
    human = rng.integers(0, 11, 50).tolist()
    predicted = (np.array(human) + rng.integers(-2, 3, 50)).tolist()
    pcc, pvalue, mae, reason = metrics.correlation(predicted, human)
    assert (pcc, pvalue) == tuple(stats.pearsonr(predicted, human))
    assert pcc == pytest.approx(np.corrcoef(predicted, human)[0, 1])
    assert mae == np.mean(np.abs(np.subtract(predicted, human))) and reason is None


@pytest.mark.parametrize(
    "predicted, human, reason",
    [
        ([8, 8, 8], [7, 8, 9], "all 3 predicted scores are 8"),
        ([7, 8, 9], [8, 8, 8], "all 3 human scores are 8"),
        ([7, 8], [8, 9], "only 2 utterances"),
        ([], [], "no scores"),
    ],
)
def test_a_correlation_that_does_not_exist_is_nan_with_its_reason(predicted, human, reason):
    pcc, pvalue, mae, why = metrics.correlation(predicted, human)
    assert math.isnan(pcc) and math.isnan(pvalue) and why == reason
    assert math.isnan(mae) == (not predicted)


def human(score):
    return dict.fromkeys(metrics.SCORES, score)


def test_an_unparsed_score_leaves_the_correlation_and_is_counted():
    apa = [(human(2), human(2)), (human(5), human(5)), (human(9), human(9)), (None, human(1))]
    numbers, reasons = metrics.summarise(apa, [])
    assert numbers["accuracy_pcc"] == pytest.approx(1) and numbers["apa_unparsed"] == 1 / 4
    assert not reasons


def test_the_reason_tells_no_outputs_from_none_that_could_be_parsed():
    assert metrics.summarise([], [])[1]["total_pcc"] == "no scores"
    assert metrics.summarise([(None, human(1))] * 4, [])[1]["total_pcc"] == "none of 4 outputs could be parsed"


def test_an_unparsed_transcript_counts_as_empty():
    reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY"], "heard": ["W", "IY"]}
    output = {"word_transcript": "we see.", "phoneme_transcript": "W IY1"}
    numbers, _ = metrics.summarise([], [(output, reference), (None, reference)])
    assert numbers["wer"] == numbers["per"] == numbers["mdd_unparsed"] == 1 / 2
    assert numbers["true_accept"] == numbers["false_reject"] == 2


def test_word_error_rate_is_jiwers():
    references = ["WE SEE NINE", "IT"]
    outputs = ["WE NINE NINE", ""]
    pairs = [
        ({"word_transcript": o, "phoneme_transcript": ""}, {"word_transcript": r, "canonical": [], "heard": []})
        for o, r in zip(outputs, references)
    ]
    assert metrics.summarise([], pairs)[0]["wer"] == jiwer.wer(references, outputs)


# ----------------------------------------------------------------------------------------------------------------------
# Per phone


def test_substitutions_deletions_and_insertions_stand_apart_and_add_up():
    heard, predicted = [list("ABCD"), list("AB")], [list("XBC"), list("ABE")]
    assert metrics.error_counts(heard, predicted).tolist() == [[1, 1, 0, 4], [0, 0, 1, 2]]
    pairs = [
        (
            {"word_transcript": "", "phoneme_transcript": " ".join(p)},
            {"word_transcript": "A", "canonical": h, "heard": h},
        )
        for h, p in zip(heard, predicted)
    ]
    numbers, _ = metrics.summarise([], pairs)
    assert (numbers["per_sub"], numbers["per_del"], numbers["per_ins"]) == (1 / 6, 1 / 6, 1 / 6)
    assert numbers["per"] == pytest.approx(1 / 2) and numbers["wer_del"] == 1


def test_the_phone_report_of_a_worked_case():
    report = metrics.phone_report([list("ABAC"), ["A"]], [list("ABXC"), ["A", "D"]])
    assert [entry["phone"] for entry in report] == ["A", "B", "C", None]
    assert report[0] == {"phone": "A", "support": 3, "precision": 1.0, "recall": 2 / 3, "confusions": [("X", 1)]}
    assert report[3]["confusions"] == [("D", 1)] and report[3]["support"] == 1


def test_the_phone_report_equals_sklearn_on_aligned_phones():
    heard, predicted = strings(20, 50), strings(21, 50)
    pairs = [pair for h, p in zip(heard, predicted) for pair in metrics.align(h, p)]
    report = {entry["phone"]: entry for entry in metrics.phone_report(heard, predicted) if entry["phone"]}
    labels = sorted(report)
    named = [[phone or "-" for phone in side] for side in zip(*pairs)]
    precision, recall, _, support = precision_recall_fscore_support(*named, labels=labels, zero_division=np.nan)
    assert [report[phone]["support"] for phone in labels] == support.tolist()
    assert np.allclose([report[phone]["precision"] for phone in labels], precision, equal_nan=True)
    assert np.allclose([report[phone]["recall"] for phone in labels], recall)


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def system(seed, number=60, speakers=12):
    """Outputs of a system that is sometimes wrong: apa, mdd, and who spoke."""
    draw = random.Random(seed)
    apa, mdd = [], []
    for truth, phones in zip(np.random.default_rng(0).integers(1, 10, number).tolist(), strings(30, number)):
        scores = {name: max(0, min(10, truth + draw.randint(-2, 2))) for name in metrics.SCORES}
        apa.append((None if draw.random() < 0.1 else scores, human(truth)))
        written = [phone if draw.random() < 0.8 else draw.choice("ABCDEX") for phone in phones]
        output = {"word_transcript": "WE SEE" if draw.random() < 0.5 else "WE", "phoneme_transcript": " ".join(written)}
        canonical = [phone if i % 4 else "A" for i, phone in enumerate(phones)]
        mdd.append((output, {"word_transcript": "WE SEE", "canonical": canonical, "heard": phones}))
    return apa, mdd, [f"s{i % speakers}" for i in range(number)]


def test_the_numbers_of_the_sums_are_those_of_scipy_and_jiwer():
    apa, mdd, _ = system(1)
    sums = {key: values.sum(axis=0) for rows in metrics.contributions(apa, mdd) for key, values in rows.items()}
    numbers, (summary, _) = metrics.numbers_of(sums), metrics.summarise(apa, mdd)
    assert all(summary[key] == pytest.approx(float(value), rel=1e-12) for key, value in numbers.items())
    heard = [" ".join(reference["heard"]) for _, reference in mdd]
    assert summary["per"] == pytest.approx(jiwer.wer(heard, [output["phoneme_transcript"] for output, _ in mdd]))


def test_a_resample_is_the_summary_of_the_speakers_that_were_drawn(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 5)
    apa, mdd, speakers = system(2)
    samples = metrics.resample(apa, mdd, speakers, speakers, seed=3)
    names = sorted(set(speakers))
    drawn = np.random.default_rng(3).multinomial(len(names), [1 / len(names)] * len(names), size=5)
    for i, counts in enumerate(drawn):
        times = [counts[names.index(speaker)] for speaker in speakers]
        chosen = [[pair for pair, count in zip(pairs, times) for _ in range(count)] for pairs in (apa, mdd)]
        expected, _ = metrics.summarise(*chosen)
        assert all(values[i] == pytest.approx(expected[key], rel=1e-9, nan_ok=True) for key, values in samples.items())


def test_the_interval_of_a_mean_like_number_is_that_of_theory():
    """The share of unparsed outputs with 50 independent speakers: the standard error of a proportion."""
    draw = random.Random(4)
    apa = [(None if draw.random() < 0.3 else human(5), human(5)) for _ in range(2000)]
    speakers = [f"s{i}" for i in range(2000)]
    low, high = metrics.interval(metrics.resample(apa, [], speakers, [], seed=0)["apa_unparsed"])
    share = sum(scores is None for scores, _ in apa) / 2000
    error = 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert (share - low, high - share) == pytest.approx((error, error), rel=0.15)


def test_utterances_of_one_speaker_are_not_independent():
    """Ten copies of each utterance say nothing new: the interval must not shrink."""
    apa, mdd, speakers = system(5)
    once = metrics.interval(metrics.resample(apa, mdd, speakers, speakers)["per"])
    copies = metrics.interval(metrics.resample(apa * 10, mdd * 10, speakers * 10, speakers * 10)["per"])
    assert copies == pytest.approx(once)


def test_the_difference_of_a_system_to_itself_is_zero_and_to_a_better_one_is_not():
    (apa, mdd, speakers), perfect = system(6), []
    for _, reference in mdd:
        perfect.append(({"word_transcript": "WE SEE", "phoneme_transcript": " ".join(reference["heard"])}, reference))
    ours, again, best = (metrics.resample(apa, pairs, speakers, speakers) for pairs in (mdd, mdd, perfect))
    assert (
        metrics.interval(ours["per"] - again["per"]) == (0, 0) and metrics.sign_pvalue(ours["per"] - again["per"]) == 1
    )
    low, _ = metrics.interval(ours["per"] - best["per"])
    assert low > 0 and metrics.sign_pvalue(ours["per"] - best["per"]) == pytest.approx(2 / metrics.RESAMPLES)


def test_mcnemar_counts_decisions_that_only_one_system_got_right():
    ours = ["true_accept"] * 8 + ["diagnosis_error", "false_accept", "false_reject"]
    theirs = ["false_reject"] * 7 + ["true_accept", "correct_diagnosis", "correct_diagnosis", "false_reject"]
    ours, theirs = ([event in metrics.RIGHT for event in events] for events in (ours, theirs))
    assert metrics.mcnemar(ours, theirs) == (7, 1, pytest.approx(2 * sum(math.comb(8, i) for i in (0, 1)) / 2**8))
    assert metrics.mcnemar(ours, ours) == (0, 0, 1.0)


def test_the_interval_of_a_share_is_wilsons():
    z = stats.norm.ppf(0.5 + metrics.LEVEL / 2)
    share, n = 20 / 24, 24
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert metrics.share_interval(20, 24) == pytest.approx(expected)
    assert all(map(math.isnan, metrics.share_interval(0, 0)))


def test_a_number_that_hardly_any_resample_has_gets_no_interval():
    assert all(map(math.isnan, metrics.interval(np.full(metrics.RESAMPLES, math.nan))))
    apa, mdd, speakers = system(7)
    constant = [(human(5), reference) for _, reference in apa]
    assert math.isnan(metrics.interval(metrics.resample(constant, mdd, speakers, speakers)["accuracy_pcc"])[0])


# ----------------------------------------------------------------------------------------------------------------------
# Properties


phones = st.lists(st.sampled_from("ABCD"), max_size=6)
corpora = st.lists(st.tuples(phones, phones, phones), min_size=1, max_size=6)


def mdd_numbers(utterances):
    pairs = [
        (
            {"word_transcript": "", "phoneme_transcript": " ".join(predicted)},
            {"word_transcript": "A", "canonical": canonical, "heard": heard},
        )
        for canonical, heard, predicted in utterances
    ]
    return metrics.summarise([], pairs)[0]


@given(corpora, st.randoms(use_true_random=False))
def test_the_order_of_utterances_changes_nothing(utterances, draw):
    shuffled = draw.sample(utterances, len(utterances))
    assert mdd_numbers(utterances) == pytest.approx(mdd_numbers(shuffled), nan_ok=True)


@given(corpora)
def test_a_perfect_prediction_has_f1_1_where_there_is_anything_to_detect(utterances):
    numbers = mdd_numbers([(canonical, heard, heard) for canonical, heard, _ in utterances])
    assert numbers["false_reject"] == numbers["false_accept"] == numbers["diagnosis_error"] == 0
    assert (numbers["detection_f1"] == 1) == any(canonical != heard for canonical, heard, _ in utterances)
    assert not numbers["per"] > 0


@given(corpora)
def test_an_empty_prediction_misses_nothing_that_was_said_and_rejects_all_that_was_right(utterances):
    """Recall 1 is no good news: everything was flagged, as precision and false rejection show. Only what a speaker
    added is missed, because nothing written for it is what a correct speaker would get."""
    without_additions = [(c, h, []) for c, h, _ in utterances if all(a is not None for a, _ in metrics.align(c, h))]
    chosen = without_additions or [(["A"], ["B"], [])]
    numbers, pairs = mdd_numbers(chosen), [pair for c, h, _ in chosen for pair in metrics.align(c, h)]
    recall, rejected = (1 if any((a == b) == right for a, b in pairs) else math.nan for right in (False, True))
    assert numbers["detection_recall"] == pytest.approx(recall, nan_ok=True)
    assert numbers["true_accept"] == 0 and numbers["detection_frr"] == pytest.approx(rejected, nan_ok=True)
