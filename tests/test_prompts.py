import hashlib
import json
import time

import pytest

import prompts

SCORES = {"accuracy": 8, "fluency": 9, "prosodic": 9, "total": 8}
WORDS = {"word_transcript": "THAT'S IT", "phoneme_transcript": "DH AE T S IH <unk>"}
DIGESTS = {
    "APA": "c759018e0c0452324bb9b5e7ddec5586e70e5ce2d765dee2828270b2f2047842",
    "MDD": "e7a61a071d87d57413f8cd7cb7f29a1ab3f77c3cae39e54f1dd7e5d04d7dc3c5",
}


@pytest.mark.parametrize("task", prompts.TASKS)
def test_a_prompt_is_the_papers_to_the_letter_in_the_order_of_figure_3(task):
    assert hashlib.sha256(prompts.PROMPTS[task].encode()).hexdigest() == DIGESTS[task]
    after = f"<|audio_1|>{prompts.PROMPTS[task]}<|end|><|assistant|>"
    assert prompts.build_prompt(task) == f"<|user|><|{task}|>{after}"
    assert prompts.build_prompt(task, control_token=False) == f"<|user|>{after}"  # of the baseline


def test_targets_are_json_with_keys_in_the_papers_order():
    assert prompts.apa_target(dict(reversed(SCORES.items()))) == json.dumps(SCORES)
    target = prompts.mdd_target("THAT'S IT", ["DH", "AE", "T", "S", "IH", "<unk>"])
    assert target == '{"word_transcript": "THAT\'S IT", "phoneme_transcript": "DH AE T S IH <unk>"}'


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SCORES),
        str(SCORES),
        f"Here are the results:\n```json\n{json.dumps(SCORES, indent=2)}\n``` I hope {{this}} helps.",
        '{"accuracy": "8", "fluency": "9.0", "prosodic": 9.0, "total": 8}',
        '{"results": {"accuracy": 8, "fluency": 9, "prosodic": 9, "total": 8, "comment": "good"}}',
        json.dumps(SCORES) * 2,
        "'accuracy': 8, 'fluency': 9, 'prosodic': 9, 'total': 8}",
        f"{SCORES} {json.dumps(SCORES)}",
    ],
)
def test_scores_are_read_as_a_model_really_writes_them(text):
    assert prompts.parse_output("APA", text) == SCORES


@pytest.mark.parametrize(
    "text",
    [
        '{"accuracy": 8, "fluency": 9, "prosodic": 9}',
        *(
            f'{{"accuracy": {value}, "fluency": 9, "prosodic": 9, "total": 8}}'
            for value in ("11", "-1", "NaN", "true", "null", '"8/10"', '8, "accuracy": 3', '{"accuracy":')
        ),
        "{'accuracy': -1, 'fluency': 9, 'prosodic': 9, 'total': 8}",
        *(f'{{"accuracy": 8, "fluency": 9, "prosodic": 9, "total": {cut}' for cut in ("1", '"1', "8 ")),
        json.dumps(SCORES) + json.dumps(SCORES | {"total": 3}),
        "{'accuracy': 3, 'fluency': 9, 'prosodic': 9, 'total': 8}" + json.dumps(SCORES),
        *(str(SCORES).replace("9,", f"{value},", 1) for value in ("8 - 9", "8 or 9", "8 / 10", "8 .5", "10 %")),
        prompts.APA_PROMPT,
    ],
)
def test_what_would_need_a_guess_about_scores_is_unparsed(text):
    assert prompts.parse_output("APA", text) is None


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(WORDS),
        "{'word_transcript': 'THAT'S IT', 'phoneme_transcript': 'DH AE T S IH <unk>'}",
        "Sure: {'phoneme_transcript': 'DH AE T S IH <unk>', 'word_transcript': 'THAT'S IT'} done",
        '{"word_transcript": "THAT\\u0027S IT", "phoneme_transcript": "DH AE T S IH <unk>"}',
    ],
)
def test_transcripts_are_read_as_a_model_really_writes_them(text):
    assert prompts.parse_output("MDD", text) == WORDS


@pytest.mark.parametrize(
    "text",
    [
        '{"word_transcript": "THAT\'S IT", "phoneme_transcript": "DH AE T',
        '{"word_transcript": "THAT\'S IT"}',
        '{"word_transcript": ["THAT\'S", "IT"], "phoneme_transcript": "DH AE"}',
        """{"word_transcript": "THAT\\u0027S IT", 'phoneme_transcript': "DH AE"}""",
        r'{"word_transcript": "THAT IS IT", "phoneme_transcript": "DH \ud800 T"}',
    ],
)
def test_a_cut_off_or_incomplete_transcript_is_unparsed(text):
    assert prompts.parse_output("MDD", text) is None


@pytest.mark.parametrize("start", ["'accuracy':'", "{", '{"accuracy":', '{"a":[1,{'])
def test_what_is_longer_than_any_answer_is_unparsed_and_nothing_takes_long(start):
    begun = time.perf_counter()
    prompts.parse_output("APA", (start * prompts.LONGEST)[: prompts.LONGEST])
    prompts.parse_output("APA", start * 100_000)
    assert time.perf_counter() - begun < 5  # 0.2 s where a machine is idle
    target = prompts.apa_target(SCORES)
    assert prompts.parse_output("APA", target.rjust(prompts.LONGEST)) == SCORES
    assert prompts.parse_output("APA", target.rjust(prompts.LONGEST + 1)) is None


@pytest.mark.parametrize("task, target", [("APA", prompts.apa_target(SCORES)), ("MDD", json.dumps(WORDS))])
def test_every_cut_of_a_target_is_unparsed_until_its_last_value_is_complete(task, target):
    for length in range(len(target)):
        assert prompts.parse_output(task, target[:length]) is None
    assert prompts.parse_output(task, target) is not None
