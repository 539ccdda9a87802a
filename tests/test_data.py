import io
import json
import math
import os
import re
import shutil
import struct
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
from transformers import Phi4MultimodalFeatureExtractor

import data
import prompts
import tiny
from support import cli, files
from support.sound import MOST_SAMPLES


def sound(wave, rate=data.SAMPLE_RATE, subtype="FLOAT"):
    """A recording: callable that returns the bytes of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype=subtype)
    return file.getvalue


def tone(seconds, rate, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Words and phones


def word(phones, *labels):
    labels = [{"canonical-phone": phones[0], "index": index, "pronounced-phone": phone} for index, phone in labels]
    record = {"text": "WORD", "phones": phones, "accuracy": 10, "mispronunciations": labels}
    return data._word(files.check(data.RatedWord, record, "a word"))


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
def test_heard_phones_are_the_canonical_ones_with_each_mispronunciation_at_its_index(labels, heard):
    result = word(["TH", "IY0", "M"], *labels)
    assert result.canonical == ("TH", "IY", "M")
    assert result.heard == tuple(heard.split())
    assert result.mispronounced == len(labels)


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_outside_its_word_is_an_error_that_names_it(index):
    with pytest.raises(cli.InputError, match=f"index {index}\\b"):
        word(["TH", "IY0", "M"], (index, "S"))


def test_phones_written_as_one_string_are_read_like_a_list():
    assert word("W IY0").canonical == ("W", "IY")


# ----------------------------------------------------------------------------------------------------------------------
# Audio


def test_16_khz_mono_is_read_as_it_is():
    wave = tone(0.5, 16_000)
    audio = data.read_audio(sound(wave))
    assert audio.dtype == np.float32 and np.array_equal(audio, wave)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled_to_the_same_tone(rate):
    audio = data.read_audio(sound(tone(1.0, rate), rate))
    assert audio.dtype == np.float32 and abs(len(audio) - 16_000) <= 1
    inner = slice(800, 15_200)  # away from the filter's edges
    assert np.abs(audio[inner] - tone(1.0, 16_000)[: len(audio)][inner]).max() < 0.01


def test_channels_are_averaged():
    left, right = tone(0.2, 16_000), tone(0.2, 16_000, 880.0)
    assert np.allclose(data.read_audio(sound(np.stack([left, right], axis=1))), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "recording, message",
    [
        (sound(np.zeros(0, np.float32)), "empty"),
        (sound(np.zeros(399, np.float32)), "399 samples at 16 kHz, less than one frame of 400"),
        (sound(np.array([0.1] * 500 + [np.nan, np.inf], np.float32)), "2 samples that are not finite"),
        (sound(np.full((500, 2), [np.inf, -np.inf], np.float32)), "500 samples that are not finite"),
        (sound(np.full((500, 2), 3e38, np.float32)), "500 samples that are not finite"),
        (lambda: b"not a sound file", "not a readable sound file"),
        (lambda: None, "not a readable sound file"),  # a row of the hub without its bytes
    ],
)
@pytest.mark.filterwarnings("error")  # a second line
def test_bad_audio_is_named(recording, message):
    with pytest.raises(cli.InputError, match=message):
        data.read_audio(recording)


def wav(samples, *chunks, size=None, whole=None, riff=b"RIFF", rate=data.SAMPLE_RATE):
    """Bytes of a 16-bit mono WAV with other chunks before its sound; size, whole: bytes that the header says."""
    order = "<" if riff == b"RIFF" else ">"
    sound = np.arange(samples, dtype=order + "i2").tobytes()
    form = struct.pack(order + "4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate % 2**32, 2, 16)
    other = b"".join(
        struct.pack(order + "4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
        for name, content in chunks
    )
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
    assert len(data.read_audio(lambda: content)) == 1000
    for missing in (1, 2, 1000):
        with pytest.raises(cli.InputError, match=f"cut off: .* 2,000 bytes of sound, {2000 - missing:,} are there"):
            data.read_audio(lambda: content[:-missing])


@pytest.mark.parametrize("riff", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize(
    "whole, size",
    [
        (0, 0),
        (8, 0),
        (36, 0),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x7FFFF024, 0x7FFFF000),
        (0x7FFFFFFF, 0x7FFFFFFF),
    ],
)
def test_a_wav_from_a_pipe_says_no_size_and_is_read_to_its_end(whole, size, riff):
    known = data.read_audio(lambda: wav(1000, *CHUNKS["odd"], riff=riff))
    piped = wav(1000, *CHUNKS["odd"], size=size, whole=whole, riff=riff)
    assert np.array_equal(data.read_audio(lambda: piped), known) and len(known) == 1000


def test_a_wav_without_sound_is_empty_whatever_comes_after():
    with pytest.raises(cli.InputError, match="empty"):
        data.read_audio(lambda: wav(1000, size=0))


@pytest.mark.parametrize("form", ["RF64", "W64", "WAVEX"])
def test_other_kinds_of_wav_are_read_as_before(form):
    file = io.BytesIO()
    soundfile.write(file, tone(0.1, 16_000), 16_000, format=form)
    assert len(data.read_audio(file.getvalue)) == 1600


@pytest.mark.parametrize(
    "rate, message",
    [
        (0, "not a readable sound file"),
        (1, "1 Hz is below 4,000 Hz"),
        (3_999, "3,999 Hz is below"),
        (384_001, "384,001 Hz"),
        (1_000_000_007, "1,000,000,007 Hz"),
        (2**32 - 1, "Hz is below|not a readable"),
    ],
)
def test_a_header_with_a_rate_that_no_recording_has_is_refused(rate, message):
    with pytest.raises(cli.InputError, match=message):
        data.read_audio(lambda: wav(16_000, rate=rate))


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_the_lowest_and_the_highest_rates_are_read(rate):
    assert abs(len(data.read_audio(lambda: wav(rate, rate=rate))) - data.SAMPLE_RATE) <= 1


@pytest.mark.parametrize("frames", [2**36 - 1, 0])  # 0: unknown, which libsndfile takes for 2**63 - 1
def test_a_header_that_claims_more_samples_than_memory_is_refused(frames, monkeypatch):
    file = io.BytesIO()
    soundfile.write(file, tone(0.1, 16_000), 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] = content[21] & 0xF0 | frames >> 32  # STREAMINFO's last 36 bits before the checksum
    content[22:26] = (frames & 2**32 - 1).to_bytes(4, "big")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # nothing may be decoded
    with pytest.raises(cli.InputError, match=f"samples .*{MOST_SAMPLES:,}"):
        data.read_audio(lambda: bytes(content))


def test_an_encoding_that_cannot_be_measured_is_an_input_error():
    file = io.BytesIO()
    soundfile.write(file, tone(0.1, 16_000), 16_000, format="AU")
    content = file.getvalue()[:15] + b"\x17" + file.getvalue()[16:]  # G.721 instead of 16-bit
    with pytest.raises(cli.InputError, match="not a readable sound file"):
        data.read_audio(lambda: content)


def test_sound_that_does_not_fit_into_memory_is_an_input_error(monkeypatch):
    def read(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(cli.InputError, match="MemoryError"):
        data.read_audio(sound(tone(0.1, 16_000)))


def test_a_damaged_header_prints_no_traceback(monkeypatch):
    printed, file = [], io.BytesIO()
    monkeypatch.setattr(sys, "unraisablehook", printed.append)  # what cffi calls when libsndfile's callback fails
    soundfile.write(file, tone(0.1, 16_000), 16_000, format="AIFF")
    with pytest.raises(cli.InputError, match="not a readable sound file"):
        data.read_audio(lambda: file.getvalue()[:22])  # libsndfile seeks to -1
    assert not printed


@pytest.mark.parametrize("samples", [400, 559, 560, 1_600, 1_839, 1_840, 16_000, 23_457])
def test_the_number_of_audio_tokens_is_the_feature_extractors(samples):
    wave = np.zeros(samples, np.float32)
    utterance = data.Utterance("u", sound(wave), samples, "", {}, (), "", 0, "")
    features = Phi4MultimodalFeatureExtractor()(wave, sampling_rate=16_000)
    assert utterance.audio_tokens == int(features["audio_embed_sizes"][0])


def test_lengths_that_crash_the_extractors_batched_path_pass_one_by_one():
    extractor = Phi4MultimodalFeatureExtractor()
    waves = [tone(samples / 16_000, 16_000) for samples in (16_000, 16_010, 12_000)]
    with pytest.raises(RuntimeError, match="must match"):
        extractor(waves, sampling_rate=16_000)
    for wave in waves:
        utterance = data.Utterance("u", sound(wave), len(wave), "", {}, (), "", 0, "")
        assert data.log_mel(utterance, extractor).shape == ((len(wave) - 400) // 160 + 1, 80)


# ----------------------------------------------------------------------------------------------------------------------
# Corpora


def test_a_folder_is_read_in_the_order_of_its_list(corpus):
    utterances = data.read_corpus(corpus, "train")
    listed = [line.split()[0] for line in (corpus / "train" / "wav.scp").read_text().splitlines()]
    records = json.loads((corpus / "resource" / "scores.json").read_text())
    assert [utterance.id for utterance in utterances] == listed
    for utterance in utterances:
        record = records[utterance.id]
        assert utterance.text == record["text"]
        assert utterance.scores == {name: record[name] for name in prompts.SCORES}
        assert utterance.canonical == [phone for w in record["words"] for phone in w["phones"]]
        assert utterance.speaker == utterance.id[:4] and utterance.age > 0 and utterance.gender in "fm"
        assert utterance.samples == len(data.read_audio(utterance.recording))


def test_limit_takes_the_first_utterances(corpus):
    ids = [utterance.id for utterance in data.read_corpus(corpus, "test")]
    assert [utterance.id for utterance in data.read_corpus(corpus, "test", limit=3)] == ids[:3]


def test_train_and_test_of_the_synthetic_corpus_share_no_speaker(corpus):
    train, test = ({u.speaker for u in data.read_corpus(corpus, split)} for split in ("train", "test"))
    assert train and test and not train & test


def hub_table(corpus, split="test"):
    """A split as the hub has it: encoded audio, no id column."""
    records = json.loads((corpus / "resource" / "scores.json").read_text())
    rows = [
        records[u.id]
        | {
            "speaker": u.speaker,
            "gender": u.gender,
            "age": u.age,
            "audio": {"bytes": u.recording(), "path": f"{u.id}.WAV"},
        }
        for u in data.read_corpus(corpus, split)
    ]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))


def test_the_hub_dataset_gives_the_same_utterances_as_the_folder(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    hub_table(corpus).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    folder = data.read_corpus(corpus, "test")
    hub = [data._utterance(**row, known={}) for row in data.read_hub("some/corpus", tmp_path, "test")]
    for ours, theirs in zip(hub, folder, strict=True):
        assert replace(ours, recording=None) == replace(theirs, recording=None)
        assert np.array_equal(data.read_audio(ours.recording), data.read_audio(theirs.recording))


@pytest.mark.skipif("SPEECHOCEAN762" not in os.environ, reason="SPEECHOCEAN762 does not name a corpus folder")
def test_the_real_test_split_has_its_published_counts():
    utterances = data.read_corpus(os.environ["SPEECHOCEAN762"], "test")
    assert len(utterances) == 2500 and len({utterance.speaker for utterance in utterances}) == 125
    assert sum(len(utterance.canonical) for utterance in utterances) == 47_369
    assert sum(word.mispronounced for utterance in utterances for word in utterance.words) == 1_412


def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


def test_every_bad_file_is_listed_and_none_is_skipped(corpus, tmp_path):
    root = copy(corpus, tmp_path)
    ids = [line.split()[0] for line in (root / "test" / "wav.scp").read_text().splitlines()]
    paths = [root / "WAVE" / f"SPEAKER{id[:4]}" / f"{id}.WAV" for id in ids]
    paths[0].unlink()
    paths[1].write_bytes(b"RIFF but no more")
    soundfile.write(paths[2], np.zeros(10, np.float32), 16_000)
    paths[3].write_bytes(b"")
    scores = root / "resource" / "scores.json"
    records = json.loads(scores.read_text())
    del records[ids[4]]
    del records[ids[5]]["fluency"]
    records[ids[6]]["total"] = 12
    records[ids[7]]["words"][0]["mispronunciations"] = [{"canonical-phone": "X", "index": 99, "pronounced-phone": "Y"}]
    records[ids[8]]["accuracy"] = None
    scores.write_text(json.dumps(records))
    with pytest.raises(cli.InputError) as error:
        data.read_corpus(root, "test")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("9 of 20 utterances") and len(lines) == 10
    reasons = ["No such file", "not a readable", "less than one frame", "not a readable", "no entry in resource/scores"]
    reasons += ["fluency is missing", "total 12", "index 99 is outside", "accuracy None"]
    for id, line, reason in zip(ids[:9], lines[1:], reasons, strict=True):
        assert line.strip().startswith(f"{id}: ") and reason in line
    assert str(paths[0]) in lines[1]


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
    "words": NO_LIST + [[], "BEAR", [{}] * 10**6],
    "words.0.text": NO_TEXT + CONTROL,
    "words.0.accuracy": NO_RATING,
    "words.0.phones": NO_LIST + [[], "  ", ["AH", "B C"], ["AH", ""], ["AH", "0"], ["<|end|>"], ["AH"] * 10**6],
    "words.0.mispronunciations": NO_LIST + ["AH", [{}] * 10**6],
    f"{LABEL}.index": [MISSING, None, True, -1, 11, 1e9, 10**400, 0.0, math.nan, "0", [], {}],
    f"{LABEL}.pronounced-phone": NO_PHONE + ["AH B", " AH", "<|end|>"],
}
WRONG = [(field, value) for field, values in BAD_FIELDS.items() for value in values]


def short(value):
    return "missing" if value is MISSING else repr(value)[:12] if isinstance(value, (list, str)) else f"{value!r:.12}"


@pytest.fixture(scope="module")
def recording():
    return sound(tone(1, data.SAMPLE_RATE))


def bear(**fields):
    """A record of one word, whose first phone was heard as another."""
    label = {"canonical-phone": "B", "index": 0, "pronounced-phone": "P"}
    word = {"text": "BEAR", "phones": ["B", "EH0", "R"], "accuracy": 6, "mispronunciations": [label], "stress": 10}
    return {"text": "BEAR", **dict.fromkeys(prompts.SCORES, 8), "words": [word], **fields}


def utterance(record, recording):
    return data._utterance("u", recording, record, "0001", "6", "m", {})


@pytest.mark.parametrize("field, value", WRONG, ids=[f"{field}-{short(value)}" for field, value in WRONG])
def test_a_field_of_another_shape_is_named_in_one_short_line(field, value, recording):
    record = bear()
    *path, last = [int(part) if part.isdecimal() else part for part in field.split(".")]
    owner = record
    for part in path:
        owner = owner[part]
    owner.pop(last) if value is MISSING else owner.update({last: value})
    with pytest.raises(cli.InputError, match=r"words\.0|" + last) as error:
        utterance(record, recording)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_value_nested_too_deeply_to_be_shown_is_still_one_line(recording):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(cli.InputError, match="text a deeply nested value"):
        utterance(bear(text=nested), recording)


def test_an_index_may_not_be_labelled_twice(recording):
    record = bear()
    record["words"][0]["mispronunciations"] *= 2
    with pytest.raises(cli.InputError, match="index 0 is labelled 2 times"):
        utterance(record, recording)


def test_scores_may_be_written_as_8_0_and_fields_that_nothing_reads_may_hold_anything(recording):
    plain = utterance(bear(), recording)
    record = bear(**dict.fromkeys(prompts.SCORES, 8.0), completeness=math.nan)
    record["words"][0].update(stress="high", accuracy=6.0)
    assert utterance(record, recording) == plain
    assert {type(score) for score in utterance(record, recording).scores.values()} == {int}


def test_equal_words_and_scores_are_held_once(corpus):
    utterances = data.read_corpus(corpus, "train")
    for held in ([u.scores for u in utterances], [word for u in utterances for word in u.words]):
        assert len({id(one) for one in held}) == len({repr(one) for one in held}) < len(held)


# ----------------------------------------------------------------------------------------------------------------------
# Files of a corpus that are no such files


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text[:-40], "scores.json is not JSON: .* line 1"),
        (lambda text: text + "}", "scores.json is not JSON: Extra data"),
        (lambda text: text.replace('"text"', "text", 1), "scores.json is not JSON: "),
        (lambda text: f"[{text}]", "scores.json: .*dict"),
        (lambda text: "{}", "000500001: no entry in resource/scores.json"),
        (lambda text: "", "scores.json is not JSON: "),
        (
            lambda text: '{"u": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "scores.json is not JSON: maximum recursion depth",
        ),
        (lambda text: '{"u": ' + "9" * 5000 + "}", "scores.json is not JSON: Exceeds the limit"),
        (lambda text: text.replace('"000500002"', '"000500001"'), "scores.json has '000500001' twice"),
        (lambda text: text[:-1] + ", " + text[1:], "scores.json has '000500001' twice"),
        (lambda text: text.replace('"fluency"', '"accuracy"', 1), "scores.json has 'accuracy' twice"),
    ],
)
def test_a_damaged_scores_file_is_one_line(corpus, tmp_path, damage, message):
    root = copy(corpus, tmp_path)
    scores = root / "resource" / "scores.json"
    records = json.loads(scores.read_text())
    text = json.dumps({id: records[id] for id in sorted(records) if id.startswith("0005")})
    scores.write_text(damage(text))
    with pytest.raises(cli.InputError, match=message) as error:
        data.read_corpus(root, "test", limit=10)
    assert all(len(line) < 300 for line in str(error.value).splitlines())


@pytest.mark.parametrize("name", ["resource/scores.json", "test/wav.scp", "test/utt2spk", "test/spk2age"])
def test_a_list_that_is_not_utf_8_is_named(corpus, tmp_path, name):
    root = copy(corpus, tmp_path)
    (root / name).write_bytes((root / name).read_bytes() + b"\xff")
    with pytest.raises(cli.InputError, match=f"{name} is not UTF-8"):
        data.read_corpus(root, "test")


@pytest.mark.parametrize("name", ["resource/scores.json", "test/wav.scp"])
def test_a_fifo_instead_of_a_list_does_not_hang(corpus, tmp_path, name):
    root = copy(corpus, tmp_path)
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(cli.InputError, match=name):
        data.read_corpus(root, "test")


def fifo(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (fifo, "is not a regular file"),
        (lambda path: "/dev/zero", "is not a regular file"),
        (lambda path: path.parent, "Is a directory"),
        (lambda path: f"{path}\0.wav", "null"),
        (lambda path: "a" * 5000, "File name too long"),
        (lambda path: path / "there", "No such file"),
        (lambda path: path.write_bytes(wav(8000)[:-2]) and path, "cut off"),
        (lambda path: path.write_bytes(wav(16_000, rate=1_000_000_007)) and path, "1,000,000,007 Hz"),
        (lambda path: path.touch() or os.truncate(path, 2**40) or path, "1,099,511,627,776 bytes"),
    ],
)
def test_a_recording_that_is_no_sound_file_is_one_line_beside_the_others(corpus, tmp_path, make, message):
    root = copy(corpus, tmp_path)
    lines = (root / "test" / "wav.scp").read_text().splitlines()
    id = lines[1].split()[0]
    lines[1] = f"{id} {make(tmp_path / 'one.wav')}"
    (root / "test" / "wav.scp").write_text("\n".join(lines))
    with pytest.raises(cli.InputError) as error:
        data.read_corpus(root, "test")
    first, second = str(error.value).split("\n")
    assert first.startswith("1 of 20 utterances") and second.startswith(f"  {id}: ") and message in second


def test_a_folder_in_the_place_of_a_file_leaves_no_descriptor_open(tmp_path):
    def next_descriptor():
        with open(os.devnull) as file:
            return file.fileno()

    before = next_descriptor()
    with pytest.raises(cli.InputError, match="Is a directory"):
        files.read_bytes(tmp_path)
    assert next_descriptor() == before


def test_a_corpus_whose_name_is_too_long_is_refused():
    with pytest.raises(cli.InputError, match="does not exist"):
        data.read_corpus("a" * 5000, "test")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("wav.scp", "000500001\n", "line 1 of .*wav.scp is not a key and a value"),
        ("wav.scp", "u a.wav\nu a.wav\n", "line 2 of .*wav.scp repeats a key"),
        ("spk2age", "0005 six\n0006 7\n", "age 'six' is not a whole number"),
        ("utt2spk", "nobody 0005\n", "no speaker, or none with age and gender"),
    ],
)
def test_a_bad_list_is_named(corpus, tmp_path, name, content, message):
    root = copy(corpus, tmp_path)
    (root / "test" / name).write_text(content)
    with pytest.raises(cli.InputError, match=message):
        data.read_corpus(root, "test")


def test_a_split_that_the_hubs_data_set_lacks_is_named(corpus, tmp_path):
    hub_table(corpus).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(cli.InputError, match="some/corpus.*'train'") as error:
        list(data.read_hub("some/corpus", tmp_path, "train"))
    assert "\n" not in str(error.value)


def test_a_missing_corpus_says_what_to_give():
    with pytest.raises(cli.InputError, match="folder no/such/corpus does not exist: give a folder or a hub id"):
        data.read_corpus("no/such/corpus", "test")


def test_a_folder_that_is_no_corpus_names_what_is_missing(tmp_path):
    with pytest.raises(cli.InputError, match="scores.json.*wav.scp.*missing"):
        data.read_corpus(tmp_path, "test")


def test_a_split_that_does_not_exist_is_named(corpus):
    with pytest.raises(cli.InputError, match="split 'dev'"):
        data.read_corpus(corpus, "dev")


def test_an_unreachable_hub_corpus_is_an_input_error():
    with pytest.raises(cli.InputError, match="nobody/nothing is not a folder here.*revision main.*network"):
        data.read_corpus("nobody/nothing", "test", "main")


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
    words = [
        {
            "text": "THEME",
            "phones": ["TH", "IY0", "M"],
            "accuracy": 2,
            "mispronunciations": [{"canonical-phone": "IY", "index": 1, "pronounced-phone": "<unk>"}],
        },
        {"text": "PARK", "phones": ["P", "AA0", "R", "K"], "accuracy": 10, "mispronunciations": []},
    ]
    record = {"text": "THEME PARK", "accuracy": 6, "fluency": 9, "prosodic": 8, "total": 5, "words": words}
    utterance = data._utterance("000010113", sound(tone(1, 16_000)), record, "0001", "6", "m", {})
    for example in data.Examples([utterance], tokenizer, audio_id=0):
        answer = tokenizer.decode(example.answer_ids).removesuffix(prompts.END)
        assert f"    {example.task}  {answer}\n" in data.__doc__


def test_each_utterance_gives_one_example_a_task(pairs):
    assert [[example.task for example in pair] for pair in pairs] == [["APA", "MDD"]] * len(pairs)


def test_an_example_reads_as_figure_3_with_a_placeholder_for_every_audio_embedding(tokenizer, pairs):
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


def test_what_does_not_fill_a_step_is_left_out_of_an_epoch_and_differs():
    left = [set(range(43)) - set(data.epoch_steps(43, 8, 0, epoch).flat) for epoch in (1, 2)]
    assert [len(rest) for rest in left] == [3, 3] and left[0] != left[1]


def test_a_corpus_smaller_than_a_step_is_one_step():
    assert [len(step) for step in data.epoch_steps(5, 8, 0, 1)] == [5]


def test_micro_batches_hold_the_step_sorted_by_length():
    step = [data.Example(None, "APA", [0] * n, [0]) for n in (3, 9, 1, 7, 5)]
    cut = data.micro_batches(step, 2)
    assert [[len(example) for example in micro_batch] for micro_batch in cut] == [[10, 8], [6, 4], [2]]


def test_processes_share_a_step_without_overlap_and_with_alike_lengths():
    step = [data.Example(None, "APA", [0] * n, [0]) for n in (3, 9, 1, 7, 5)]
    shares = [data.micro_batches(step, 2, rank, processes=2) for rank in (0, 1)]
    lengths = [[[len(example) for example in micro_batch] for micro_batch in share] for share in shares]
    assert lengths == [[[10, 6], [2]], [[8, 4]]]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (cli.InputError("no such corpus"), 2, "x.py: error: no such corpus"),
        (cli.RunError("step 3: loss nan"), 1, "x.py: error: step 3: loss nan"),
        (OSError(28, "No space left on device"), 1, "x.py: error: [Errno 28] No space left on device"),
    ],
)
def test_an_error_for_the_user_is_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_script("x.py", main)
    assert stop.value.code == code and capsys.readouterr().err == line + "\n"


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(FileNotFoundError):
        cli.run_script("x.py", main)


class Letters:
    """A tokenizer with a token for every character, but for what `pieces` names."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def encode(self, text, add_special_tokens):
        parts = re.split("(" + "|".join(self.pieces) + ")", text) if self.pieces else [text]
        return [hash(piece) for part in parts for piece in ([part] if part in self.pieces else part)]


def test_score_slots_are_the_answer_without_its_scores():
    before, values = data.encode_score_slots(Letters("10"))
    text = [hash(c) for c in '{"accuracy": '], [hash(c) for c in ', "fluency": ']
    assert before[:2] == list(text) and len(before) == 4
    assert values == [hash(str(value)) for value in range(11)]


@pytest.mark.parametrize("pieces", [(), ("10", "7, ")])
def test_a_tokenizer_that_splits_10_or_joins_a_score_with_its_comma_is_refused(pieces):
    with pytest.raises(cli.InputError, match="does not write each of 0 to 10 as one token: use --scoring greedy"):
        data.encode_score_slots(Letters(*pieces))


# ----------------------------------------------------------------------------------------------------------------------
# Sound files of one's own


def write_sound(path, audio, rate=data.SAMPLE_RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate)
    return path


def test_sound_files_are_found_in_folders_too_and_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.wav", "a.FLAC", "b/1.ogg"):
        write_sound(tmp_path / name, np.zeros(800))
    (tmp_path / "notes.txt").write_text("no sound")
    assert [str(path.relative_to(tmp_path)) for path in data.sound_files(tmp_path)] == ["a.FLAC", "b/1.ogg", "b/2.wav"]


def test_a_folder_without_recordings_is_refused_by_name(tmp_path):
    with pytest.raises(cli.InputError, match=f"{tmp_path} has no recordings"):
        data.sound_files(tmp_path)


@pytest.mark.parametrize(
    "audio, rate, message",
    [
        (np.zeros(4000), 8000, "8,000 Hz is below 16,000 Hz"),
        (np.zeros(40_000), 16_000, "2.50 s is longer than 2 s"),
        (np.ones(8000), 16_000, "100.0% of the samples are at full scale"),
        (np.zeros(0), 16_000, "recording is empty"),
        (np.zeros(400_000), 400_000, "its header says 400,000 Hz"),
    ],
)
def test_a_sound_file_that_would_mislead_is_refused_by_name(tmp_path, audio, rate, message):
    path = write_sound(tmp_path / "one.wav", audio, rate)
    with pytest.raises(cli.InputError) as error:
        data.read_sound_file(path, longest=2, lowest_rate=data.SAMPLE_RATE)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_sound_is_refused_by_name(tmp_path):
    path = tmp_path / "one.wav"
    path.write_text("no sound")
    with pytest.raises(cli.InputError, match=f"{path}: not a readable sound file"):
        data.read_sound_file(path)


@pytest.mark.parametrize(
    "make, message",
    [
        (fifo, "is not a regular file"),
        (lambda path: path.mkdir() or path, "Is a directory"),
        (lambda path: path.write_bytes(wav(8000)[:-2]) and path, "cut off"),
        (lambda path: path.write_bytes(wav(16_000, rate=1)) and path, "1 Hz is below 4,000 Hz"),
    ],
)
def test_a_file_of_ones_own_that_cannot_be_read_whole_is_refused_by_name(tmp_path, make, message):
    path = make(tmp_path / "one.wav")
    with pytest.raises(cli.InputError, match=f"{path}.*{message}"):
        data.read_sound_file(path)


def test_a_recording_whose_name_is_not_utf_8_is_refused_by_name(tmp_path):
    os.rename(write_sound(tmp_path / "a.wav", np.zeros(800)), os.fsencode(tmp_path) + b"/a\xff.wav")
    with pytest.raises(cli.InputError, match=r"a\\udcff.wav' is not UTF-8: rename it"):
        data.sound_files(tmp_path)
