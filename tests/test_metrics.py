from collections import Counter
import functools
import itertools
import math
import random

import jiwer
import numpy as np
import pytest
from records import one_hot, records
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support

import metrics
import prompts


def strings(seed, number, alphabet="ABCDE", longest=9):
    draw = random.Random(seed)
    return [[draw.choice(alphabet) for _ in range(draw.randint(0, longest))] for _ in range(number)]


def lines(heard, predicted, canonical=None):
    """MDD lines of these phones, as in predictions.jsonl."""
    return [
        {
            "id": f"u{i}",
            "task": "MDD",
            "output": prompts.mdd_target("A", p),
            "reference": {"word_transcript": "A", "canonical": c, "heard": h},
        }
        for i, (h, p, c) in enumerate(zip(heard, predicted, canonical or heard))
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Alignment


def kaldi_alignment(first, second):
    """Kaldi's LevenshteinAlignment, said once more: costs by recursion, traceback from the end."""

    @functools.cache
    def cost(m, n):
        if not m or not n:
            return m + n
        return min(cost(m - 1, n - 1) + (first[m - 1] != second[n - 1]), cost(m - 1, n) + 1, cost(m, n - 1) + 1)

    pairs, m, n = [], len(first), len(second)
    while m or n:
        both = cost(m - 1, n - 1) + (first[m - 1] != second[n - 1]) if m and n else math.inf
        deletion, insertion = (cost(m - 1, n) + 1 if m else math.inf), (cost(m, n - 1) + 1 if n else math.inf)
        if both <= min(deletion, insertion):
            m, n = m - 1, n - 1
            pairs.insert(0, (first[m], second[n]))
        elif deletion <= insertion:
            m -= 1
            pairs.insert(0, (first[m], None))
        else:
            n -= 1
            pairs.insert(0, (None, second[n]))
    return pairs


def test_phones_are_aligned_by_kaldis_rule_on_random_strings():
    for first, second in zip(strings(1, 300), strings(2, 300)):
        assert metrics.align(first, second) == kaldi_alignment(first, second)


# ----------------------------------------------------------------------------------------------------------------------
# Error rates


def test_the_parts_of_the_per_are_those_of_the_confusions_on_random_strings():
    heard, predicted, canonical = strings(3, 100), strings(4, 100), strings(8, 100)
    kinds = Counter(metrics.kind_of(*pair) for phones in zip(heard, predicted) for pair in metrics.align(*phones))
    numbers, *_ = metrics.score(lines(heard, predicted, canonical))
    parts = dict(zip(("per_sub", "per_del", "per_ins"), metrics.KINDS[1:]))
    assert {key: numbers[key] for key in parts} == {k: kinds[v] / sum(map(len, heard)) for k, v in parts.items()}
    assert numbers["per"] == pytest.approx(metrics.error_rate(heard, predicted))  # by jiwer
    assert math.isnan(metrics.error_rate([[]], [["A"]]))  # no reference


def test_word_errors_are_jiwers():
    spoken, words = ([" ".join(letters) for letters in strings(seed, 100)] for seed in (9, 10))
    records = lines([[]] * 100, [[]] * 100)
    for record, reference, output in zip(records, spoken, words):
        record["output"] = prompts.mdd_target(output, [])
        record["reference"]["word_transcript"] = reference
    numbers, found = metrics.score(records)[0], jiwer.process_words(spoken, words)
    length = sum(len(text.split()) for text in spoken)
    assert numbers["wer"] == found.wer and numbers["wer_sub"] == found.substitutions / length
    assert (numbers["wer_del"], numbers["wer_ins"]) == (found.deletions / length, found.insertions / length)


def test_words_are_compared_in_upper_case_without_punctuation():
    assert metrics.normalise_words("  'Hello,' that's -- well-known ?! ") == ["HELLO", "THAT'S", "WELL", "KNOWN"]
    assert metrics.normalise_words("that’s") == ["THAT'S"]


def test_phones_are_compared_without_case_and_stress_but_keep_their_marks():
    assert metrics.normalise_phones("dh AH0 <unk> <UNK> r* EY2 1") == ["DH", "AH", "<unk>", "<unk>", "R*", "EY"]
    answers = records()
    for answer in answers[1::2]:
        answer["reference"] |= {"canonical": ["w", "iy1", "S", "IY0"], "heard": ["W", "IH2", "s", "iy"]}
    assert metrics.phones_of(answers) == metrics.phones_of(records())


# ----------------------------------------------------------------------------------------------------------------------
# Detection


def counts_by_the_published_rules(canonical, heard, predicted):
    """The rules as the Kaldi-style script states them, on operation letters: C, S, D, I."""
    count = dict.fromkeys(metrics.EVENTS, 0)
    said, answered = kaldi_alignment(canonical, heard), kaldi_alignment(heard, predicted)
    a2 = [written for phone, written in answered if phone is not None]  # of each heard phone
    a3 = [written for phone, written in kaldi_alignment(canonical, predicted) if phone is not None]
    for (phone, perceived), written in zip([pair for pair in said if pair[0] is not None], a3):
        if perceived is None:  # A1 is D: A3's D, C, S
            event = {None: "correct_diagnosis", phone: "false_accept"}.get(written, "diagnosis_error")
            count[event] += 1
    for (phone, perceived), written in zip([pair for pair in said if pair[1] is not None], a2):
        if phone == perceived:  # A1 is C
            count["true_accept" if written == perceived else "false_reject"] += 1
        elif written == perceived:  # A1 is S or I, A2 is C
            count["correct_diagnosis"] += 1
        elif phone is None:  # A1 is I: A2's D, S
            count["false_accept" if written is None else "diagnosis_error"] += 1
        else:
            count["false_accept" if written == phone else "diagnosis_error"] += 1
    return count


def test_detection_follows_the_published_rules_on_random_strings():
    for canonical, heard, predicted in zip(strings(5, 500), strings(6, 500), strings(7, 500)):
        expected = counts_by_the_published_rules(canonical, heard, predicted)
        assert metrics.detection_counts([canonical], [heard], [predicted]) == expected


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


def test_columns_hold_each_phone_once_and_the_events_that_are_counted():
    for phones in zip(strings(5, 300), strings(6, 300), strings(7, 300)):
        columns = metrics.phone_columns(*phones)
        rows, events = [[column[i] for column in columns] for i in range(3)], [event for *_, event in columns]
        assert [[phone for phone in row if phone is not None] for row in rows] == list(phones)
        counted = metrics.detection_counts(*([row] for row in phones))
        assert Counter(filter(None, events)) == Counter(counted)
        assert all((event is None) == (c is None and h is None) for c, h, _, event in columns)
        other = metrics.phone_columns(*phones[:2], phones[0])
        said = [[column[:2] for column in of if column[-1]] for of in (columns, other)]
        assert said[0] == said[1]  # so the decisions of two systems can be paired


def test_a_written_phone_stands_under_the_one_that_was_left_out():
    columns = metrics.phone_columns("DH AH K AE T".split(), "D AH K AE".split(), "D AH G AE T".split())
    events = "correct_diagnosis true_accept false_reject true_accept false_accept".split()
    assert columns == list(zip("DH AH K AE T".split(), ["D", "AH", "K", "AE", None], "D AH G AE T".split(), events))


# ----------------------------------------------------------------------------------------------------------------------
# Phone agreement


def test_phone_agreement_equals_sklearns_weighted_scores_by_position():
    heard, predicted = strings(13, 50), strings(14, 50, "ABCDEF")
    pairs = [pair for h, p in zip(heard, predicted) for pair in itertools.zip_longest(h, p, fillvalue="-")]
    labels = sorted({phone for utterance in heard for phone in utterance})
    expected = precision_recall_fscore_support(*zip(*pairs), labels=labels, average="weighted", zero_division=0)
    numbers, *_ = metrics.score(lines(heard, predicted))
    found = [numbers[f"phone_agreement_{key}"] for key in ("precision", "recall", "f1")]
    assert found == pytest.approx(list(expected[:3]))


# ----------------------------------------------------------------------------------------------------------------------
# Correlation and summary


@pytest.mark.parametrize("scale", [1, 0.37, 1e-4])  # whole scores, expectations, nearly the same of all
def test_numbers_of_scores_equal_scipy_and_numpy(scale):
    rng = np.random.default_rng(0)
    human = rng.integers(0, 11, 50).astype(float)
    predicted = 5 + scale * (human + rng.integers(-2, 3, 50))
    numbers, pearson = metrics.score_numbers(predicted, human), stats.pearsonr(predicted, human)
    assert metrics.correlation(predicted, human) == (pearson.statistic, pearson.pvalue, None)
    assert numbers["pcc"] == pytest.approx(pearson.statistic, rel=1e-10)
    assert numbers["mae"] == pytest.approx(np.mean(np.abs(predicted - human)))
    assert numbers["spearman"] == pytest.approx(stats.spearmanr(predicted, human).statistic)
    assert numbers["sd_ratio"] == pytest.approx(np.std(predicted) / np.std(human))


@pytest.mark.parametrize(
    "predicted, human, reason",
    [
        ([5.3] * 7, [7, 8, 9] * 2 + [1], "all 7 predicted scores are 5.3"),
        ([5.3 + 1e-15 * i for i in (0, 1, 2, 4, 5)], [7, 8, 9, 9, 10], "all 5 predicted scores are 5.3"),
        ([5.3 + 1e-7 * i for i in (0, 1, 2, 4, 5)], [7, 8, 9, 9, 10], "all 5 predicted scores are 5.3"),
        ([7, 8], [8, 9], "only 2 utterances"),
        ([], [], "no scores"),
    ],
)
def test_a_correlation_that_does_not_exist_is_nan_with_its_reason(predicted, human, reason):
    predicted, human = np.array(predicted, float), np.array(human, float)
    numbers = metrics.score_numbers(predicted, human)
    pcc, pvalue, why = metrics.correlation(predicted, human)
    assert why == reason and np.isnan([pcc, pvalue, numbers["pcc"], numbers["spearman"]]).all()
    assert math.isnan(numbers["mae"]) == (not len(predicted))


# ----------------------------------------------------------------------------------------------------------------------
# A predictions file


def test_scoring_counts_what_was_unparsed_and_cut_off():
    answers = records()
    answers[0]["output"] = "no scores today"
    answers[3]["output"] = '{"word_transcript": "WE SE'
    numbers, _, reasons = metrics.score(answers)
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
    found = [metrics.scorings(answers) for answers in (records(), probable, written)]
    assert found == [["greedy"], ["expected"], ["greedy", "expected"]]
    predicted, human = metrics.assessment_rows(written, "expected")[0].tolist()
    assert predicted == [6.5] * 4 and human == [written[0]["reference"][name] for name in metrics.SCORES]


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def samples(lines):
    return metrics.score(lines, resample=True)[1]


def system(seed, number=60, speakers=12, right=0.8):
    """Lines of a system that is sometimes wrong, about the same utterances for each seed."""
    draw, answers = random.Random(seed), []
    for i, phones in enumerate(strings(30, number)):
        spoken, truth = {"id": f"u{i}", "speaker": f"s{i % speakers}"}, 1 + i * 7 % 9
        scores = {name: max(0, min(10, truth + draw.randint(-2, 2))) for name in metrics.SCORES}
        output = "?" if draw.random() < 0.1 else prompts.apa_target(scores)
        reference = dict.fromkeys(metrics.SCORES, truth)
        answers.append(spoken | {"task": "APA", "output": output, "reference": reference})
        written = [phone if draw.random() < right else draw.choice("ABCDEX") for phone in phones]
        output = prompts.mdd_target("WE SEE" if draw.random() < right else "WE", written)
        canonical = [phone if i % 4 else "A" for i, phone in enumerate(phones)]
        reference = {"word_transcript": "WE SEE", "canonical": canonical, "heard": phones}
        answers.append(spoken | {"task": "MDD", "output": output, "reference": reference})
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_a_corpus_in_which_each_utterance_stands_so_often(seed, monkeypatch):
    """The numbers of each of five corpora of drawn speakers, against `score` of the lines repeated."""
    monkeypatch.setattr(metrics, "RESAMPLES", 5)
    answers = system(seed)[:-20]  # not all speakers have as many utterances
    names = sorted({line["speaker"] for line in answers})
    drawn = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=5)
    found = samples(answers)
    assert not found.keys() & {*metrics.EVENTS}  # counts, which grow with a corpus
    for i, counts in enumerate(drawn):
        repeated = [line for line in answers for _ in range(counts[names.index(line["speaker"])])]
        expected, *_ = metrics.score(repeated)
        for key, values in found.items():
            assert values[i] == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def test_utterances_of_one_speaker_are_not_independent():
    """Ten copies of each utterance say nothing new: the interval must not shrink."""
    answers = system(5)
    once, copied = samples(answers), samples(answers * 10)
    assert all(copied[key] == pytest.approx(values, nan_ok=True) for key, values in once.items())
    assert samples(records(6)) == samples(records(6, speakers=1)) == {}  # nobody to draw


def test_the_difference_of_a_system_to_itself_is_zero_and_to_a_better_one_is_not():
    ours, best = (samples(system(6, right=right))["per"] for right in (0.8, 1))
    again = samples(system(6)[::-1])["per"]  # in another order of lines
    assert metrics.interval(ours - again) == pytest.approx((0, 0), abs=1e-12)
    assert metrics.sign_pvalue(np.zeros(metrics.RESAMPLES)) == 1
    low, _ = metrics.interval(ours - best)
    assert low > 0 and metrics.sign_pvalue(ours - best) == pytest.approx(2 / metrics.RESAMPLES)


def test_mcnemar_counts_decisions_that_only_one_system_got_right():
    ours = ["true_accept"] * 8 + ["diagnosis_error", "false_accept", "false_reject"]
    theirs = ["false_reject"] * 7 + ["true_accept", "correct_diagnosis", "correct_diagnosis", "false_reject"]
    ours, theirs = ([event in metrics.RIGHT for event in events] for events in (ours, theirs))
    assert metrics.mcnemar(ours, theirs) == (7, 1, pytest.approx(2 * sum(math.comb(8, i) for i in (0, 1)) / 2**8))
    assert metrics.mcnemar(ours, ours) == (0, 0, 1.0)


def test_a_number_that_hardly_any_resample_has_gets_no_interval():
    assert all(map(math.isnan, metrics.interval(np.full(metrics.RESAMPLES, math.nan))))
    same = prompts.apa_target(dict.fromkeys(metrics.SCORES, 5))
    constant = [line | ({"output": same} if line["task"] == "APA" else {}) for line in system(7)]
    assert math.isnan(metrics.interval(samples(constant)["accuracy_pcc"])[0])
