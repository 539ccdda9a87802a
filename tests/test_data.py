from dataclasses import replace
import json
import math
import os
from pathlib import Path
import re

from conftest import copy_of, sound, tone
import datasets
import numpy as np
import pytest
from transformers import Phi4MultimodalFeatureExtractor

import data
import prompts
from support import cli, files
from support.sound import read_audio
import tiny

SECOND = sound(tone(1))


def record(**fields):
    """A record of one word, whose first phone was heard as another."""
    label = {"canonical-phone": "B", "index": 0, "pronounced-phone": "P"}
    word = {"text": "BEAR", "phones": ["B", "EH0", "R"], "accuracy": 6, "mispronunciations": [label], "stress": 10}
    return {"text": "BEAR", **dict.fromkeys(prompts.SCORES, 8), "words": [word], **fields}


def checked(record):
    utterance = data._utterance("u", lambda: SECOND, record, "0001")
    data.check(utterance)
    return utterance


# ----------------------------------------------------------------------------------------------------------------------
# The corpus


@pytest.mark.parametrize(
    "labels, heard",
    [
        ([], "TH IY M"),
        ([(0, "S"), (2, "N")], "S IY N"),
        ([(0, "<DEL>"), (1, "IH0")], "IH M"),  # the index is the canonical one, also after a deletion
        ([(1, "<unk>")], "TH <unk> M"),
        ([(1, "IY*")], "TH IY* M"),
    ],
)
@pytest.mark.parametrize("phones", [["TH", "IY0", "M"], "TH IY0 M"])
def test_heard_phones_are_the_canonical_ones_with_each_label_at_its_index(phones, labels, heard):
    labels = [{"index": index, "pronounced-phone": phone} for index, phone in labels]
    word = {"text": "THEME", "phones": phones, "accuracy": 10, "mispronunciations": labels}
    (word,) = checked(record(words=[word])).words
    assert (word.canonical, word.heard) == (("TH", "IY", "M"), tuple(heard.split()))
    assert word.mispronounced == len(labels)


@pytest.mark.parametrize("samples", [400, 559, 560, 1_600, 1_839, 1_840, 16_000, 23_457])
def test_the_number_of_audio_tokens_is_the_feature_extractors(samples):
    features = Phi4MultimodalFeatureExtractor()(np.zeros(samples, np.float32), sampling_rate=16_000)
    assert replace(checked(record()), samples=samples).audio_tokens == int(features["audio_embed_sizes"][0])


def test_a_folder_is_read_in_the_order_of_its_list_up_to_the_limit(corpus):
    utterances = data.read_corpus(corpus, "train")
    listed = [line.split()[0] for line in (corpus / "train" / "wav.scp").read_text().splitlines()]
    assert [utterance.id for utterance in utterances] == listed
    assert [utterance.id for utterance in data.read_corpus(corpus, "train", limit=3)] == listed[:3]
    records = files.read_json(corpus / "resource" / "scores.json", dict)
    for utterance in utterances:
        record = records[utterance.id]
        assert utterance.text == record["text"] and utterance.speaker == utterance.id[:4]
        assert utterance.scores == {name: record[name] for name in prompts.SCORES}
        assert utterance.canonical == [phone for w in record["words"] for phone in w["phones"]]
        assert utterance.samples == len(read_audio(utterance.recording))
    assert not {u.speaker for u in utterances} & {u.speaker for u in data.read_corpus(corpus, "test")}


def hub_table(corpus, split):
    """A split as the hub has it: encoded audio, no id column."""
    records = files.read_json(corpus / "resource" / "scores.json", dict)
    rows = [
        records[u.id] | {"speaker": u.speaker, "age": 9, "audio": {"bytes": u.recording(), "path": f"{u.id}.WAV"}}
        for u in data.read_corpus(corpus, split)
    ]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))


def test_the_hub_dataset_gives_the_same_utterances_as_the_folder(corpus, tmp_path):
    folder = data.read_corpus(corpus, "test")
    (tmp_path / "data").mkdir()
    hub_table(corpus, "test").to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    hub = data.read_corpus(tmp_path, "test")
    assert data.fingerprint(hub) == data.fingerprint(folder)
    for ours, theirs in zip(hub, folder, strict=True):
        assert np.array_equal(read_audio(ours.recording), read_audio(theirs.recording))
    with pytest.raises(cli.InputError, match=f"{tmp_path}.*'train'"):
        data.read_corpus(tmp_path, "train")


@pytest.mark.skipif("SPEECHOCEAN762" not in os.environ, reason="SPEECHOCEAN762 does not name a corpus folder")
def test_the_real_test_split_has_its_published_counts():
    utterances = data.read_corpus(Path(os.environ["SPEECHOCEAN762"]), "test")
    assert len(utterances) == 2500 and len({utterance.speaker for utterance in utterances}) == 125
    assert sum(len(utterance.canonical) for utterance in utterances) == 47_369
    assert sum(word.mispronounced for utterance in utterances for word in utterance.words) == 1_412


MISSING = object()
LABEL = "words.0.mispronunciations.0"
NO_TEXT = [MISSING, None, "  ", "\ud800", "A" * 10**7, "A <|end|> B", "A \0 B", "A\nB"]
BAD_FIELDS = {
    "text": NO_TEXT,
    "total": [MISSING, None, True, -1, 11, 10**400, math.nan, "8", 7.5, 7.999999999999],
    "words": [MISSING, None, [None], []],
    "words.0.text": NO_TEXT,
    "words.0.phones": [MISSING, None, [], "  ", ["AH", "B C"], ["AH", "0"], ["<|end|>"]],
    "words.0.mispronunciations": [MISSING, None, "AH", [[]]],
    f"{LABEL}.index": [MISSING, None, True, -1, 3, 10**400, 0.0, "0"],
    f"{LABEL}.pronounced-phone": [MISSING, None, 7, "", "7", "\ud800", "AH B", " AH", "<|end|>"],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_field_of_another_shape_is_named_in_one_short_line(field):
    *path, last = [int(part) if part.isdecimal() else part for part in field.split(".")]
    for value in BAD_FIELDS[field]:
        owner = bad = record()
        for part in path:
            owner = owner[part]
        owner.pop(last) if value is MISSING else owner.update({last: value})
        with pytest.raises(cli.InputError, match=r"words\.0|phones|" + last) as error:
            checked(bad)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_an_index_with_two_labels_is_refused_and_a_score_may_be_written_as_8_0():
    twice, other = record(), record(**dict.fromkeys(prompts.SCORES, 8.0), completeness=math.nan)
    twice["words"][0]["mispronunciations"] *= 2
    with pytest.raises(cli.InputError, match=r"'BEAR': mispronunciation index twice.*\[0, 0\]"):
        checked(twice)
    other["words"][0].update(stress="high", accuracy="high")  # which nothing reads
    assert replace(checked(other), recording=None) == replace(checked(record()), recording=None)
    assert {type(score) for score in checked(other).scores.values()} == {int}


def written(content):
    return lambda path: path.write_bytes(content) and path


def test_every_utterance_that_cannot_be_used_is_listed_with_its_reason(corpus, tmp_path):
    makes = {
        "No such file": lambda path: path / "there",
        "cut off": written(SECOND[:-2]),
        "all its samples are 0": written(sound(np.zeros(16_000))),
    }
    root = copy_of(corpus, tmp_path)
    lines = (root / "test" / "wav.scp").read_text().splitlines()
    ids = [line.split()[0] for line in lines]
    for i, make in enumerate(makes.values()):
        lines[i] = f"{ids[i]} {make(tmp_path / f'{i}.wav')}"
    (root / "test" / "wav.scp").write_text("\n".join(lines))
    speakers = (root / "test" / "utt2spk").read_text().splitlines()
    (root / "test" / "utt2spk").write_text("\n".join(line for line in speakers if not line.startswith(ids[3])))
    records = files.read_json(root / "resource" / "scores.json", dict)
    del records[ids[4]]
    records[ids[5]]["total"] = 12
    (root / "resource" / "scores.json").write_text(json.dumps(records))
    with pytest.raises(cli.InputError) as error:
        data.read_corpus(root, "test")
    first, *others = str(error.value).split("\n")
    assert first.startswith("6 utterances of")
    for line, id, reason in zip(others, ids, (*makes, "no speaker", "no entry", "total 12")):
        assert line.startswith(f"  {id}: ") and reason in line


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("scores.json", lambda text: text[:-40], "is not JSON: .* line"),
        ("scores.json", lambda text: text.replace('"000500002"', '"000500001"'), "'000500001' twice"),
        ("wav.scp", lambda text: text + "\udcff", "is not UTF-8"),
        ("wav.scp", lambda text: text + "u\n", "line 21 of .* is not a key and a value"),
    ],
)
def test_a_damaged_file_of_a_corpus_is_named_in_one_line(corpus, tmp_path, name, damage, message):
    (path,) = copy_of(corpus, tmp_path).glob(f"[rt]e*/{name}")  # resource/ or test/
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(cli.InputError, match=f"{path}.*{message}" if "line" not in message else message) as error:
        data.read_corpus(tmp_path / "copy", "test")
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_byte_order_mark_is_dropped_and_lines_end_at_newlines_alone(corpus, tmp_path):
    root, read = copy_of(corpus, tmp_path), data.read_corpus(corpus, "test")
    for path in (root / "resource" / "scores.json", *(root / "test" / name for name in ("wav.scp", "utt2spk"))):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert data.fingerprint(data.read_corpus(root, "test")) == data.fingerprint(read)
    speakers = (root / "test" / "utt2spk").read_text().replace(" ", " one\u2028\x85")
    (root / "test" / "utt2spk").write_text(speakers)
    assert {u.speaker for u in data.read_corpus(root, "test")} == {f"one\u2028\x85{u.speaker}" for u in read}
    (tmp_path / "predictions.jsonl").write_text('\ufeff{"text": "a\u2028\x85b"}\n')
    assert files.read_lines(tmp_path / "predictions.jsonl", dict) == [{"text": "a\u2028\x85b"}]


# ----------------------------------------------------------------------------------------------------------------------
# Examples and batches


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.new_tokenizer()
    tokenizer.add_tokens(list(prompts.CONTROL_TOKENS.values()), special_tokens=True)
    return tokenizer


AUDIO = tiny.SPECIAL_TOKENS[2]


@pytest.fixture(scope="module")
def examples_of(tokenizer):
    """Makes the examples of an utterance, a list."""
    return lambda utterance: data.make_examples([utterance], tokenizer, tokenizer.convert_tokens_to_ids(AUDIO))


@pytest.mark.parametrize(
    "missing, tasks", [({}, ["APA", "MDD"]), ({"scores": None}, ["MDD"]), ({"words": ()}, ["APA"])]
)
def test_an_utterance_gives_an_example_of_each_task_that_it_has_labels_for(examples_of, missing, tasks):
    utterance = replace(checked(record()), **missing)
    assert [example.task for example in examples_of(utterance)] == [*utterance.tasks] == tasks
    assert data.describe([utterance]) and data.fingerprint([utterance])


def test_an_example_that_is_too_long_is_named_and_never_cut(tokenizer, utterances):
    with pytest.raises(cli.InputError, match=r"^65 examples .* --max-tokens 50, such as 000400001 \(APA\) with 91: "):
        data.make_examples(utterances, tokenizer, 0, longest=50)


def test_prompts_read_as_figure_3_and_exactly_the_answers_are_supervised(tokenizer, utterances, examples_of):
    """With a placeholder for every embedding, and an end token behind each answer."""
    examples = [example for utterance in utterances[:4] for example in examples_of(utterance)]
    batch = data.collate(examples, tokenizer.pad_token_id)
    for example, ids, labels in zip(examples, batch.input_ids, batch.labels, strict=True):
        u, (places,) = example.utterance, np.nonzero(labels != data.IGNORE)
        scores = ", ".join(f'"{name}": {u.scores[name]}' for name in prompts.SCORES)
        words = f'"word_transcript": "{u.text}", "phoneme_transcript": "{" ".join(u.heard)}"'
        assert tokenizer.decode(labels[places]) == "{" + (scores if example.task == "APA" else words) + "}<|end|>"
        assert (ids[places] == labels[places]).all() and (np.diff(places) == 1).all()
        prompt = prompts.build_prompt(example.task).replace(prompts.AUDIO, AUDIO * u.audio_tokens)
        assert tokenizer.decode(ids[: places[0]]) == prompt
        assert (ids[places[-1] + 1 :] == tokenizer.pad_token_id).all()
    assert batch.tokens == sum(map(len, examples)) and batch.utterances == [e.utterance for e in examples]


def test_labels_are_built_from_lengths():
    """A genuine pad token is an answer's like any other, and a prompt may be as long as a whole row."""
    batch = data.collate([data.Example(None, "APA", *row) for row in (([5, 0], [7, 0, 8]), ([6] * 5, []))], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 0, 7, 0, 8], [6] * 5]
    assert batch.labels.tolist() == [[-100, -100, 7, 0, 8], [-100] * 5]


def test_an_epoch_visits_each_example_once_in_an_order_of_seed_and_epoch():
    def steps(seed, epoch):
        return data.epoch_steps(40, 8, seed, epoch).tolist()

    assert sorted(sum(steps(0, 1), [])) == list(range(40)) and [len(step) for step in steps(0, 1)] == [8] * 5
    assert steps(0, 1) == steps(0, 1) != steps(0, 2) and steps(0, 1) != steps(1, 1)
    left = [set(range(43)) - set(data.epoch_steps(43, 8, 0, epoch).flat) for epoch in (1, 2)]
    assert [len(rest) for rest in left] == [3, 3] and left[0] != left[1]  # what does not fill a step differs
    assert [len(step) for step in data.epoch_steps(5, 8, 0, 1)] == [5]  # a corpus smaller than a step


@pytest.mark.parametrize(
    "share, lengths",
    [((), [[10, 8], [6, 4], [2]]), ((0, 2), [[10, 6], [2]]), ((1, 2), [[8, 4]])],
)
def test_micro_batches_are_sorted_by_length_and_processes_share_them(share, lengths):
    step = [data.Example(None, "APA", [0] * n, [0]) for n in (3, 9, 1, 7, 5)]
    cut = data.micro_batches(step, 2, *share)
    assert [[len(example) for example in micro_batch] for micro_batch in cut] == lengths


class Letters:
    """A tokenizer with a token for every character, but for what `pieces` names."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def encode(self, text, add_special_tokens):
        parts = re.split("(" + "|".join(self.pieces) + ")", text) if self.pieces else [text]
        return [hash(piece) for part in parts for piece in ([part] if part in self.pieces else part)]


def test_score_slots_are_an_answer_without_its_scores_where_each_is_one_token():
    before, values = data.encode_score_slots(Letters("10"))
    text = [hash(c) for c in '{"accuracy": '], [hash(c) for c in ', "fluency": ']
    assert before[:2] == list(text) and len(before) == 4
    assert values == [hash(str(value)) for value in range(11)]
    for pieces in ((), ("10", "7, ")):  # one splits 10, the other joins a score with its comma
        with pytest.raises(cli.InputError, match="0 to 10 .*: use --scoring greedy"):
            data.encode_score_slots(Letters(*pieces))
