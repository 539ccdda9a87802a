import json
import math
import os
import re
import struct
import sys
from dataclasses import replace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import soundfile
from conftest import copy_of, sound, tone
from transformers import Phi4MultimodalFeatureExtractor

import data
import prompts
import tiny
from support import cli, files
from support.sound import MOST_SAMPLES

SECOND = sound(tone(1))


def read(content):
    return data.read_audio(lambda: content)


def record(**fields):
    """A record of one word, whose first phone was heard as another."""
    label = {"canonical-phone": "B", "index": 0, "pronounced-phone": "P"}
    word = {"text": "BEAR", "phones": ["B", "EH0", "R"], "accuracy": 6, "mispronunciations": [label], "stress": 10}
    return {"text": "BEAR", **dict.fromkeys(prompts.SCORES, 8), "words": [word], **fields}


def checked(record):
    return data._utterance("u", lambda: SECOND, record, "0001", "6", "m", {})


# ----------------------------------------------------------------------------------------------------------------------
# Words and phones


@pytest.mark.parametrize(
    "labels, heard",
    [
        ([], "TH IY M"),
        ([(1, "IH")], "TH IH M"),
        ([(0, "S"), (2, "N")], "S IY N"),
        ([(0, "<DEL>")], "IY M"),
        ([(0, "<DEL>"), (1, "IH0")], "IH M"),  # the index is the canonical one, also after a deletion
        ([(1, "<unk>")], "TH <unk> M"),
        ([(1, "IY*")], "TH IY* M"),
    ],
)
@pytest.mark.parametrize("phones", [["TH", "IY0", "M"], "TH IY0 M"])
def test_heard_phones_are_the_canonical_ones_with_each_mispronunciation_at_its_index(phones, labels, heard):
    labels = [{"index": index, "pronounced-phone": phone} for index, phone in labels]
    word = {"text": "THEME", "phones": phones, "accuracy": 10, "mispronunciations": labels}
    (word,) = checked(record(words=[word])).words
    assert (word.canonical, word.heard) == (("TH", "IY", "M"), tuple(heard.split()))
    assert word.mispronounced == len(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Audio


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_is_read_as_the_same_tone_at_16_khz_with_its_channels_averaged(rate):
    both = sound(np.stack([tone(1, rate), 0 * tone(1, rate)], axis=1), rate)
    audio, expected = read(both), tone(1) / 2
    assert audio.dtype == np.float32 and abs(len(audio) - 16_000) <= 1
    inner = slice(800, 15_200)  # away from the filter's edges
    assert np.abs(audio[inner] - expected[inner]).max() < (0.005 if rate != 16_000 else 1e-9)


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "WAVEX", "FLAC"])
def test_16_khz_mono_is_read_as_it_is(form):
    audio = read(sound(tone(0.1), format=form, subtype="PCM_24"))
    assert np.allclose(audio, tone(0.1), atol=1e-6)


def wav(samples, *chunks, size=None, whole=None, riff=b"RIFF", rate=data.SAMPLE_RATE):
    """Bytes of a 16-bit mono WAV with other chunks before its sound; size, whole: bytes that the header says."""
    order = "<" if riff == b"RIFF" else ">"
    sound = np.arange(samples, dtype=order + "i2").tobytes()
    form = struct.pack(order + "4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate % 2**32, 2, 16)
    headers = [struct.pack(order + "4sI", name, len(content)) for name, content in chunks]
    other = b"".join(h + content + b"\0" * (len(content) % 2) for h, (_, content) in zip(headers, chunks))
    size = len(sound) if size is None else size
    content = b"WAVE" + form + other + struct.pack(order + "4sI", b"data", size) + sound
    return riff + struct.pack(order + "I", len(content) if whole is None else whole) + content


CHUNKS = {
    "none": [],
    "odd": [(b"note", b"odd")],
    "nested": [(b"LIST", b"INFO" + b"ICMT\x0c\0\0\0data\0\0\x10\0tone")],  # no sound, though it says so
    "both": [(b"note", b"1"), (b"LIST", b"adtl" + b"labl\x04\0\0\0data"), (b"bext", b"\0" * 602)],
}


@pytest.mark.parametrize("chunks, riff", [*((name, b"RIFF") for name in CHUNKS), ("odd", b"RIFX")])
def test_a_wav_that_was_cut_off_says_what_is_missing(chunks, riff):
    content = wav(1000, *CHUNKS[chunks], riff=riff)
    assert len(read(content)) == 1000
    for missing in (1, 2, 1000):
        with pytest.raises(cli.InputError, match=f"cut off: .* 2,000 .* {2000 - missing:,} "):
            read(content[:-missing])


SIZES = [(0, 0), (8, 0), (36, 0), (2**32 - 1, 2**32 - 1), (0x7FFFF024, 0x7FFFF000), (2**31 - 1, 2**31 - 1)]


@pytest.mark.parametrize("riff", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize("whole, size", SIZES)
def test_a_wav_from_a_pipe_says_no_size_and_is_read_to_its_end(whole, size, riff):
    known = read(wav(1000, *CHUNKS["odd"], riff=riff))
    piped = wav(1000, *CHUNKS["odd"], size=size, whole=whole, riff=riff)
    assert np.array_equal(read(piped), known) and len(known) == 1000


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_the_lowest_and_the_highest_rates_are_read(rate):
    assert abs(len(read(wav(rate, rate=rate))) - data.SAMPLE_RATE) <= 1


@pytest.mark.parametrize(
    "content, message",
    [
        (sound(np.zeros(0, np.float32)), "empty"),
        (sound(np.zeros(399, np.float32)), "399 samples at 16 kHz"),
        (sound(np.array([0.1] * 500 + [np.nan, np.inf], np.float32)), "2 samples that are not finite"),
        (sound(np.full((500, 2), [np.inf, -np.inf], np.float32)), "500 samples that are not finite"),
        (sound(np.full((500, 2), 3e38, np.float32)), "500 samples that are not finite"),
        (b"not a sound file", "not a readable sound file"),
        (None, "not a readable sound file"),  # a row of the hub without its bytes
        (wav(1000, size=0), "empty"),  # whatever comes after
        (wav(16_000, rate=0), "not a readable sound file"),
        (wav(16_000, rate=1), "1 Hz is below 4,000 Hz"),
        (wav(16_000, rate=3_999), "3,999 Hz is below"),
        (wav(16_000, rate=384_001), "384,001 Hz"),
        (wav(16_000, rate=1_000_000_007), "1,000,000,007 Hz"),
        (wav(16_000, rate=2**32 - 1), "Hz is below|not a readable"),
        # G.721 instead of 16-bit, which cannot be measured
        (sound(tone(0.1), format="AU")[:15] + b"\x17" + sound(tone(0.1), format="AU")[16:], "not a readable"),
        (sound(tone(0.1), format="AIFF")[:22], "not a readable"),  # libsndfile seeks to -1, in a callback
    ],
)
@pytest.mark.filterwarnings("error")  # a second line
def test_bad_audio_is_named_and_nothing_else_is_printed(monkeypatch, content, message):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)  # what cffi calls when a callback fails
    with pytest.raises(cli.InputError, match=message):
        read(content)
    assert not printed


@pytest.mark.parametrize("frames", [2**36 - 1, 0])  # 0: unknown, which libsndfile takes for 2**63 - 1
def test_a_header_that_claims_more_samples_than_memory_is_refused(frames, monkeypatch):
    content = bytearray(sound(tone(0.1), format="FLAC"))
    content[21] = content[21] & 0xF0 | frames >> 32  # STREAMINFO's last 36 bits before the checksum
    content[22:26] = (frames & 2**32 - 1).to_bytes(4, "big")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # nothing may be decoded
    with pytest.raises(cli.InputError, match=f"samples .*{MOST_SAMPLES:,}"):
        read(bytes(content))
    monkeypatch.setattr(soundfile.SoundFile, "read", Mock(side_effect=MemoryError))
    with pytest.raises(cli.InputError, match="MemoryError"):
        read(SECOND)


@pytest.mark.parametrize("samples", [400, 559, 560, 1_600, 1_839, 1_840, 16_000, 23_457])
def test_the_number_of_audio_tokens_is_the_feature_extractors(samples):
    features = Phi4MultimodalFeatureExtractor()(np.zeros(samples, np.float32), sampling_rate=16_000)
    assert replace(checked(record()), samples=samples).audio_tokens == int(features["audio_embed_sizes"][0])


def test_lengths_that_crash_the_extractors_batched_path_pass_one_by_one():
    extractor = Phi4MultimodalFeatureExtractor()
    waves = [tone(samples / 16_000) for samples in (16_000, 16_010, 12_000)]
    with pytest.raises(RuntimeError, match="must match"):
        extractor(waves, sampling_rate=16_000)
    for wave in waves:
        utterance = replace(checked(record()), recording=lambda wave=wave: sound(wave))
        assert data.log_mel(utterance, extractor).shape == ((len(wave) - 400) // 160 + 1, 80)


# ----------------------------------------------------------------------------------------------------------------------
# Corpora


def test_a_folder_is_read_in_the_order_of_its_list_up_to_the_limit(corpus):
    utterances = data.read_corpus(corpus, "train")
    listed = [line.split()[0] for line in (corpus / "train" / "wav.scp").read_text().splitlines()]
    assert [utterance.id for utterance in utterances] == listed
    assert [utterance.id for utterance in data.read_corpus(corpus, "train", limit=3)] == listed[:3]
    records = files.read_json(corpus / "resource" / "scores.json", dict)
    for utterance in utterances:
        record = records[utterance.id]
        assert utterance.text == record["text"]
        assert utterance.scores == {name: record[name] for name in prompts.SCORES}
        assert utterance.canonical == [phone for w in record["words"] for phone in w["phones"]]
        assert utterance.speaker == utterance.id[:4]
        assert utterance.samples == len(data.read_audio(utterance.recording))
    assert not {u.speaker for u in utterances} & {u.speaker for u in data.read_corpus(corpus, "test")}


def hub_table(corpus, split="test"):
    """A split as the hub has it: encoded audio, no id column."""
    records = files.read_json(corpus / "resource" / "scores.json", dict)
    rows = [
        records[u.id]
        | {"speaker": u.speaker, "gender": "f", "age": 9, "audio": {"bytes": u.recording(), "path": f"{u.id}.WAV"}}
        for u in data.read_corpus(corpus, split)
    ]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))


def test_the_hub_dataset_gives_the_same_utterances_as_the_folder_and_names_a_split_that_it_lacks(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    hub_table(corpus).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    folder = data.read_corpus(corpus, "test")
    hub = [data._utterance(**row, known={}) for row in data.read_hub("some/corpus", tmp_path, "test")]
    assert data.fingerprint(hub) == data.fingerprint(folder)
    for ours, theirs in zip(hub, folder, strict=True):
        assert np.array_equal(data.read_audio(ours.recording), data.read_audio(theirs.recording))
    with pytest.raises(cli.InputError, match="some/corpus.*'train'") as error:
        list(data.read_hub("some/corpus", tmp_path, "train"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif("SPEECHOCEAN762" not in os.environ, reason="SPEECHOCEAN762 does not name a corpus folder")
def test_the_real_test_split_has_its_published_counts():
    utterances = data.read_corpus(os.environ["SPEECHOCEAN762"], "test")
    assert len(utterances) == 2500 and len({utterance.speaker for utterance in utterances}) == 125
    assert sum(len(utterance.canonical) for utterance in utterances) == 47_369
    assert sum(word.mispronounced for utterance in utterances for word in utterance.words) == 1_412


MISSING = object()
LABEL = "words.0.mispronunciations.0"
NO_TEXT = [MISSING, None, True, 7, [], {}, "", "  ", "\ud800", "A" * 10**7]
CONTROL = ["A <|end|> B", "A \0 B", "A\nB"]
NO_PHONE = [MISSING, None, True, 7, [], {}, "", "7", "\ud800", "A" * 10**7]
NO_RATING = [MISSING, None, True, -1, 11, 1e9, 10**400, math.nan, math.inf, "high", "8", [], {}]
NO_LIST = [MISSING, None, True, 7, "", {}, [None], [[]]]
BAD_FIELDS = {
    "text": NO_TEXT + CONTROL,
    **dict.fromkeys(prompts.SCORES, NO_RATING + [7.5, 7.999999999999]),
    "words": NO_LIST + [[], "BEAR", [{}] * 10**5],
    "words.0.text": NO_TEXT + CONTROL,
    "words.0.accuracy": NO_RATING,
    "words.0.phones": NO_LIST + [[], "  ", ["AH", "B C"], ["AH", ""], ["AH", "0"], ["<|end|>"], ["AH"] * 10**5],
    "words.0.mispronunciations": NO_LIST + ["AH", [{}] * 10**5],
    f"{LABEL}.index": [MISSING, None, True, -1, 3, 1e9, 10**400, 0.0, math.nan, "0", [], {}],
    f"{LABEL}.pronounced-phone": NO_PHONE + ["AH B", " AH", "<|end|>"],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_field_of_another_shape_is_named_in_one_short_line(field):
    *path, last = [int(part) if part.isdecimal() else part for part in field.split(".")]
    for value in BAD_FIELDS[field]:
        owner = bad = record()
        for part in path:
            owner = owner[part]
        owner.pop(last) if value is MISSING else owner.update({last: value})
        with pytest.raises(cli.InputError, match=r"words\.0|" + last) as error:
            checked(bad)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_value_nested_too_deeply_to_be_shown_and_an_index_that_is_labelled_twice_are_one_line_too():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(cli.InputError, match="text a deeply nested value"):
        checked(record(text=nested))
    twice = record()
    twice["words"][0]["mispronunciations"] *= 2
    with pytest.raises(cli.InputError, match="index 0 .*2 times"):
        checked(twice)


def test_scores_may_be_written_as_8_0_and_fields_that_nothing_reads_may_hold_anything():
    other = record(**dict.fromkeys(prompts.SCORES, 8.0), completeness=math.nan)
    other["words"][0].update(stress="high", accuracy=6.0)
    read, plain = checked(other), checked(record())
    assert replace(read, recording=None) == replace(plain, recording=None)
    assert {type(score) for score in read.scores.values()} == {int}


def test_equal_words_and_scores_are_held_once(corpus):
    utterances = data.read_corpus(corpus, "train")
    for held in ([u.scores for u in utterances], [word for u in utterances for word in u.words]):
        assert len({id(one) for one in held}) == len({repr(one) for one in held}) < len(held)


# ----------------------------------------------------------------------------------------------------------------------
# Files of a corpus that are no such files


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def written(content):
    return lambda path: path.write_bytes(content) and path


UNUSABLE = [  # in the place of a sound file
    (fifo, "is not a regular file"),
    (lambda path: path.parent, "Is a directory"),
    (written(b"no sound"), "not a readable sound file"),
    (written(wav(8000)[:-2]), "cut off"),
    (written(wav(16_000, rate=1)), "1 Hz is below 4,000 Hz"),
    (lambda path: path.touch() or os.truncate(path, 2**40) or path, "1,099,511,627,776 bytes"),
]


@pytest.mark.parametrize(
    "make, message",
    [
        *UNUSABLE,
        (lambda path: "/dev/zero", "is not a regular file"),
        (lambda path: f"{path}\0.wav", "null"),
        (lambda path: "a" * 5000, "File name too long"),
        (lambda path: path / "there", "No such file"),
    ],
)
def test_every_utterance_that_cannot_be_used_is_listed_in_a_line_with_its_reason(corpus, tmp_path, make, message):
    root = copy_of(corpus, tmp_path)
    lines = (root / "test" / "wav.scp").read_text().splitlines()
    ids = [line.split()[0] for line in lines]
    lines[1] = f"{ids[1]} {make(tmp_path / 'one.wav')}"
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
    reasons = (message, "no speaker", "no entry", "total 12")
    assert first.startswith("4 of 20 utterances")
    for line, id, reason in zip(others, (ids[1], *ids[3:6]), reasons, strict=True):
        assert line.startswith(f"  {id}: ") and reason in line


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("scores.json", lambda text: text[:-40], "is not JSON: .* line"),
        ("scores.json", lambda text: text + "}", "is not JSON: Extra data"),
        ("scores.json", lambda text: text.replace('"text"', "text", 1), "is not JSON: "),
        ("scores.json", lambda text: f"[{text}]", ": .*dict"),
        ("scores.json", lambda text: "", "is not JSON: "),
        ("scores.json", lambda text: '{"u": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON: .*recursion"),
        ("scores.json", lambda text: '{"u": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("scores.json", lambda text: text.replace('"000500002"', '"000500001"'), "'000500001' twice"),
        ("scores.json", lambda text: text.replace('"fluency"', '"accuracy"', 1), "'accuracy' twice"),
        ("scores.json", lambda text: text + "\udcff", "is not UTF-8"),
        ("scores.json", None, ""),
        ("wav.scp", lambda text: text + "\udcff", "is not UTF-8"),
        ("wav.scp", lambda text: "000500001\n", "000500001"),
        ("wav.scp", lambda text: "u a.wav\nu a.wav\n", "repeats a key"),
        ("wav.scp", None, ""),
        ("utt2spk", lambda text: text + "\udcff", "is not UTF-8"),
    ],
)
def test_a_damaged_file_of_a_corpus_is_named_in_one_line(corpus, tmp_path, name, damage, message):
    (path,) = copy_of(corpus, tmp_path).glob(f"[rt]e*/{name}")  # resource/ or test/
    if damage:
        path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    else:
        fifo(path)  # which would wait for ever
    with pytest.raises(cli.InputError, match=f"{path}.*{message}") as error:
        data.read_corpus(tmp_path / "copy", "test")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_in_the_place_of_a_file_leaves_no_descriptor_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(cli.InputError, match="Is a directory"):
        files.read_bytes(tmp_path)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "source, split, message",
    [
        ("no/such/corpus", "test", "no/such/corpus does not exist: give a folder or a hub id"),
        ("a" * 5000, "test", "does not exist"),
        (os.path.dirname(__file__), "test", "scores.json.*wav.scp.*missing"),
        (None, "dev", "split 'dev'"),
        ("nobody/nothing", "test", "nobody/nothing is not a folder here.*revision main.*network"),
    ],
)
def test_a_corpus_that_is_not_there_says_what_to_give(corpus, source, split, message):
    with pytest.raises(cli.InputError, match=message):
        data.read_corpus(source or corpus, split, "main" if source == "nobody/nothing" else None)


# ----------------------------------------------------------------------------------------------------------------------
# Examples and batches


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.new_tokenizer()
    tokenizer.add_tokens(list(prompts.CONTROL_TOKENS.values()), special_tokens=True)
    return tokenizer


AUDIO = tiny.SPECIAL_TOKENS[2]


@pytest.fixture(scope="module")
def pairs(tokenizer, utterances):
    return [list(data.Examples([u], tokenizer, tokenizer.convert_tokens_to_ids(AUDIO))) for u in utterances]


def test_the_record_in_the_docstring_gives_the_answers_beside_it(tokenizer):
    label = {"canonical-phone": "IY", "index": 1, "pronounced-phone": "<unk>"}
    words = [
        {"text": "THEME", "phones": ["TH", "IY0", "M"], "accuracy": 2, "mispronunciations": [label]},
        {"text": "PARK", "phones": ["P", "AA0", "R", "K"], "accuracy": 10, "mispronunciations": []},
    ]
    scores = {"accuracy": 6, "fluency": 9, "prosodic": 8, "total": 5}
    utterance = checked(record(text="THEME PARK", words=words, **scores))
    for example in data.Examples([utterance], tokenizer, audio_id=0):
        answer = tokenizer.decode(example.answer_ids).removesuffix(prompts.END)
        assert f"    {example.task}  {answer}\n" in data.__doc__


def test_an_example_of_each_task_reads_as_figure_3_with_a_placeholder_for_every_audio_embedding(tokenizer, pairs):
    assert [[example.task for example in pair] for pair in pairs] == [["APA", "MDD"]] * len(pairs)
    for example in (example for pair in pairs for example in pair):
        text = prompts.build_prompt(example.task).replace(prompts.AUDIO, AUDIO * example.utterance.audio_tokens)
        assert tokenizer.decode(example.prompt_ids) == text


def test_exactly_the_answer_and_its_end_token_are_supervised(tokenizer, pairs):
    for apa, mdd in pairs:
        batch = data.collate([apa, mdd], tokenizer.pad_token_id)
        scores, (u, labels) = apa.utterance.scores, (mdd.utterance, batch["labels"])
        supervised = [tokenizer.decode(row[row != data.IGNORE]) for row in labels]
        assert supervised == [
            f'{{"accuracy": {scores["accuracy"]}, "fluency": {scores["fluency"]}, '
            f'"prosodic": {scores["prosodic"]}, "total": {scores["total"]}}}<|end|>',
            f'{{"word_transcript": "{u.text}", "phoneme_transcript": "{" ".join(u.heard)}"}}<|end|>',
        ]
        for ids, row, example in zip(batch["input_ids"], labels, (apa, mdd)):
            padding = np.arange(len(ids)) >= len(example)
            first = np.flatnonzero(row != data.IGNORE)[0]
            assert tokenizer.decode(ids[:first]).endswith("<|end|><|assistant|>")
            assert np.array_equal(row[row != data.IGNORE], ids[row != data.IGNORE])
            assert (row[padding] == data.IGNORE).all() and (ids[padding] == tokenizer.pad_token_id).all()


def test_a_genuine_pad_token_in_an_answer_would_still_be_supervised():
    example = data.Example(None, "APA", [5, 6], [7, 0, 8])
    assert data.collate([example], pad_id=0)["labels"].tolist() == [[-100, -100, 7, 0, 8]]


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
def test_micro_batches_hold_the_step_sorted_by_length_and_processes_share_it_without_overlap(share, lengths):
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


def test_score_slots_are_the_answer_without_its_scores_where_each_score_is_a_token():
    before, values = data.encode_score_slots(Letters("10"))
    text = [hash(c) for c in '{"accuracy": '], [hash(c) for c in ', "fluency": ']
    assert before[:2] == list(text) and len(before) == 4
    assert values == [hash(str(value)) for value in range(11)]
    for pieces in ((), ("10", "7, ")):  # one splits 10, the other joins a score with its comma
        with pytest.raises(cli.InputError, match="0 to 10 .*: use --scoring greedy"):
            data.encode_score_slots(Letters(*pieces))


# ----------------------------------------------------------------------------------------------------------------------
# Sound files of one's own


def test_sound_files_are_found_in_folders_too_and_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.wav", "a.FLAC", "b/1.ogg", "notes.txt"):
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in data.sound_files(tmp_path)] == ["a.FLAC", "b/1.ogg", "b/2.wav"]


def test_a_folder_without_recordings_or_with_a_name_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(cli.InputError, match=f"{tmp_path} has no recordings"):
        data.sound_files(tmp_path)
    open(os.fsencode(tmp_path) + b"/a\xff.wav", "w").close()
    with pytest.raises(cli.InputError, match=r"a\\udcff.wav' is not UTF-8: rename it"):
        data.sound_files(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        *UNUSABLE,
        (written(sound(tone(0.5, 8000), 8000)), "8,000 Hz is below 16,000 Hz"),
        (written(sound(tone(2.5))), "2.50 s is longer than 2 s"),
        (written(sound(np.ones(8000))), "100.0% of the samples are at full scale"),
        (written(sound(np.zeros(0))), "empty"),
        (written(sound(tone(1, 400_000), 400_000)), "400,000 Hz"),
    ],
)
def test_a_sound_file_that_would_mislead_is_refused_by_name(tmp_path, make, message):
    path = make(tmp_path / "one.wav")
    lowest = 0 if "4,000" in message else data.SAMPLE_RATE
    with pytest.raises(cli.InputError, match=f"^{path}.*{message}"):
        data.read_sound_file(path, longest=2, lowest_rate=lowest or 4_000)
