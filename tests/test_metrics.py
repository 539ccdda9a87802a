import functools
import math
import random

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from records import one_hot, records
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support

import metrics


def strings(seed, number, alphabet="ABCDE", longest=9):
    draw = random.Random(seed)
    return [[draw.choice(alphabet) for _ in range(draw.randint(0, longest))] for _ in range(number)]


def outputs(heard, predicted, canonical=None):
    """MDD outputs of these phones, as metrics.summarise takes them."""
    return [
        (
            {"word_transcript": "", "phoneme_transcript": " ".join(p)},
            {"word_transcript": "A", "canonical": c, "heard": h},
        )
        for h, p, c in zip(heard, predicted, canonical or heard)
    ]


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


@pytest.mark.parametrize(
    "references, hypotheses, rate",
    [
        (["A", "ABC"], ["X", "ABC"], 1 / 4),  # pooled over the corpus, not averaged
        (["AB", "C"], ["", "C"], 2 / 3),  # an empty transcript: each reference phone is an error
        ([""], ["A"], math.nan),
        ([], [], math.nan),
    ],
)
def test_error_rates_of_worked_cases(references, hypotheses, rate):
    phones = [list(map(list, side)) for side in (references, hypotheses)]
    assert metrics.error_rate(*phones) == pytest.approx(rate, nan_ok=True)


def test_the_error_rate_is_that_of_the_alignment():
    references, hypotheses = strings(3, 100), strings(4, 100)
    errors = sum(a != b for r, h in zip(references, hypotheses) for a, b in metrics.align(r, h))
    assert metrics.error_rate(references, hypotheses) == pytest.approx(errors / sum(map(len, references)))


def test_substitutions_deletions_and_insertions_stand_apart_and_add_up():
    heard, predicted = [list("ABCD"), list("AB")], [list("XBC"), list("ABE")]
    assert metrics.error_counts(heard, predicted).tolist() == [[1, 1, 0, 4], [0, 0, 1, 2]]
    assert metrics.error_parts(heard, predicted) == [1 / 6, 1 / 6, 1 / 6]
    numbers, _ = metrics.summarise([], outputs(heard, predicted))
    assert (numbers["per_sub"], numbers["per_del"], numbers["per_ins"]) == (1 / 6, 1 / 6, 1 / 6)
    assert numbers["per"] == pytest.approx(1 / 2) and numbers["wer_del"] == 1


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
        ("A <unk>", "A <unk>", "A B", {"true_accept": 1, "false_reject": 1}),  # <unk> equals no phone but itself
        ("R", "R*", "R", {"false_accept": 1}),  # nor does a starred phone equal its plain one
    ],
)
def test_detection_of_worked_cases(canonical, heard, predicted, expected):
    counts = metrics.detection_counts([canonical.split()], [heard.split()], [predicted.split()])
    assert {key: value for key, value in counts.items() if value} == expected


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


# ----------------------------------------------------------------------------------------------------------------------
# Correlation and summary


def test_correlation_and_error_equal_scipy_and_numpy():
    rng = np.random.default_rng(0)
    for scale in (1, 0.37, 1e-4):  # whole scores, expectations, and those of a model that says nearly the same of all
        human = rng.integers(0, 11, 50).tolist()
        predicted = (5 + scale * (np.array(human) + rng.integers(-2, 3, 50))).tolist()
        pcc, pvalue, mae, reason = metrics.correlation(predicted, human)
        assert (pcc, pvalue) == pytest.approx(tuple(stats.pearsonr(predicted, human)), rel=1e-10)
        assert mae == pytest.approx(np.mean(np.abs(np.subtract(predicted, human)))) and reason is None


@pytest.mark.parametrize(
    "predicted, human, reason",
    [
        ([8, 8, 8], [7, 8, 9], "all 3 predicted scores are 8"),
        ([5.3] * 7, [7, 8, 9] * 2 + [1], "all 7 predicted scores are 5.3"),
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


def test_the_reason_tells_no_outputs_from_none_that_could_be_parsed():
    assert metrics.summarise([], [])[1]["total_pcc"] == "no scores"
    assert metrics.summarise([(None, human(1))] * 4, [])[1]["total_pcc"] == "none of 4 outputs could be parsed"


def test_an_unparsed_transcript_counts_as_empty():
    reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY"], "heard": ["W", "IY"]}
    output = {"word_transcript": "we see.", "phoneme_transcript": "W IY1"}
    numbers, _ = metrics.summarise([], [(output, reference), (None, reference)])
    assert numbers["wer"] == numbers["per"] == numbers["mdd_unparsed"] == 1 / 2
    assert numbers["true_accept"] == numbers["false_reject"] == 2


# ----------------------------------------------------------------------------------------------------------------------
# A predictions file


def test_scoring_counts_what_was_unparsed_and_cut_off():
    lines = records()
    lines[0]["output"] = "no scores today"
    lines[3]["output"] = '{"word_transcript": "WE SE'
    numbers, reasons = metrics.score(lines)
    assert numbers["apa_unparsed"] == numbers["mdd_unparsed"] == numbers["mdd_truncated"] == 1 / 6
    assert numbers["apa_truncated"] == 0 and numbers["utterances"] == 6
    assert numbers["accuracy_pcc"] == pytest.approx(1) and numbers["accuracy_mae"] == 1
    assert numbers["fluency_pcc"] == pytest.approx(1) and numbers["fluency_mae"] == 0
    assert math.isnan(numbers["prosodic_pcc"]) and reasons == {"prosodic_pcc": "all 5 predicted scores are 5"}
    assert numbers["per"] == (5 * 1 + 4) / 24 and numbers["wer"] == 2 / 12
    assert numbers["detection_recall"] == 1 and numbers["detection_precision"] == 6 / 14
    assert all(type(value) in (float, int) for value in numbers.values())  # as json writes them


def test_a_file_tells_which_scorings_it_holds_and_expected_scores_are_means():
    probable = [line | ({"scores": one_hot(8, 5)} if line["task"] == "APA" else {}) for line in records()]
    written = [line | {"tokens": 5} for line in probable]
    assert [metrics.scorings(lines) for lines in (records(), probable, written)] == [
        ["greedy"],
        ["expected"],
        ["greedy", "expected"],
    ]
    apa, _ = metrics.paired(written, "expected")
    assert apa[0] == (dict.fromkeys(metrics.SCORES, 6.5), written[0]["reference"])
    assert metrics.likeliest(probable[0]["scores"]["total"]) == 5


def test_intervals_hold_the_number_and_need_speakers():
    low, high = metrics.intervals(records(12, speakers=4))["detection_precision"]
    assert low <= metrics.score(records(12))[0]["detection_precision"] <= high
    assert metrics.intervals(records(12)) == metrics.intervals(records(12, speakers=1)) == {}
    assert not metrics.intervals(records(12, speakers=4)).keys() & {*metrics.EVENTS}  # counts, which grow with a corpus


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


@pytest.mark.parametrize("seed", range(3))
def test_a_number_of_weights_is_that_of_a_corpus_in_which_each_utterance_stands_so_often(seed):
    """Ones are the corpus itself, a row of (R, N) one resample of it."""
    apa, mdd, _ = system(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(apa)))
    weights[0], weights[1] = 1, np.arange(len(apa)) < 2  # two utterances have no correlation
    many = metrics.assessment(apa, weights) | metrics.diagnosis(mdd, weights)
    for i, counts in enumerate(weights):
        one = metrics.assessment(apa, counts) | metrics.diagnosis(mdd, counts)
        repeated = [[pair for pair, n in zip(pairs, counts) for _ in range(n)] for pairs in (apa, mdd)]
        expected, _ = metrics.summarise(*repeated)
        assert many.keys() == one.keys() <= expected.keys()
        for key, values in many.items():
            assert one[key] == pytest.approx(expected[key], rel=1e-12, nan_ok=True)
            assert values[i] == pytest.approx(one[key], rel=1e-15, nan_ok=True)


def test_a_resample_of_speakers_draws_all_utterances_of_each_as_often(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 5)
    apa, mdd, speakers = system(2)
    names = sorted(set(speakers))
    drawn = np.random.default_rng(3).multinomial(len(names), [1 / len(names)] * len(names), size=5)
    weights = metrics.speaker_weights(speakers, seed=3)
    assert weights.shape == (5, len(speakers))
    assert weights.tolist() == [[counts[names.index(speaker)] for speaker in speakers] for counts in drawn]
    samples = metrics.resample(apa, mdd[:30], speakers, speakers[:30], seed=3)
    numbers = metrics.assessment(apa, weights) | metrics.diagnosis(mdd[:30], weights[:, :30])
    assert all(np.array_equal(values, numbers[key], equal_nan=True) for key, values in samples.items())


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
    same = ours["per"] - again["per"]
    assert metrics.interval(same) == (0, 0) and metrics.sign_pvalue(same) == 1
    low, _ = metrics.interval(ours["per"] - best["per"])
    assert low > 0 and metrics.sign_pvalue(ours["per"] - best["per"]) == pytest.approx(2 / metrics.RESAMPLES)


def test_mcnemar_counts_decisions_that_only_one_system_got_right():
    ours = ["true_accept"] * 8 + ["diagnosis_error", "false_accept", "false_reject"]
    theirs = ["false_reject"] * 7 + ["true_accept", "correct_diagnosis", "correct_diagnosis", "false_reject"]
    ours, theirs = ([event in metrics.RIGHT for event in events] for events in (ours, theirs))
    assert metrics.mcnemar(ours, theirs) == (7, 1, pytest.approx(2 * sum(math.comb(8, i) for i in (0, 1)) / 2**8))
    assert metrics.mcnemar(ours, ours) == (0, 0, 1.0)


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
    canonical, heard, predicted = zip(*utterances)
    return metrics.summarise([], outputs(heard, predicted, canonical))[0]


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
