import io
import json
import os
import re
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
from transformers import Phi4MultimodalFeatureExtractor

import data
import prompts
import tiny
from support import cli


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
    return data._word({"text": "WORD", "phones": phones, "accuracy": 10, "mispronunciations": [
        {"canonical-phone": phones[0], "index": index, "pronounced-phone": phone} for index, phone in labels
    ]})  # fmt: skip


@pytest.mark.parametrize("labels, heard", [
    ([], "TH IY M"),
    ([(1, "IH")], "TH IH M"),
    ([(0, "S"), (2, "N")], "S IY N"),
    ([(0, "<DEL>")], "IY M"),
    ([(0, "<DEL>"), (1, "IH0")], "IH M"),  # the index is the canonical one, also after a deletion
    ([(1, "<unk>")], "TH <unk> M"),
    ([(1, "IY*")], "TH IY* M"),
])  # fmt: skip
def test_heard_phones_are_the_canonical_ones_with_each_mispronunciation_at_its_index(labels, heard):
    result = word(["TH", "IY0", "M"], *labels)
    assert result.canonical == ("TH", "IY", "M")
    assert result.heard == tuple(heard.split())
    assert result.mispronounced == len(labels)


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_outside_its_word_is_an_error_that_names_it(index):
    with pytest.raises(cli.InputError, match=f"index {index} is outside WORD"):
        word(["TH", "IY0", "M"], (index, "S"))


def test_phones_written_as_one_string_are_read_like_a_list():
    assert data._word({"text": "WE", "phones": "W IY0", "accuracy": 10, "mispronunciations": []}).canonical == (
        "W",
        "IY",
    )


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


@pytest.mark.parametrize("recording, message", [
    (sound(np.zeros(0, np.float32)), "empty"),
    (sound(np.zeros(399, np.float32)), "399 samples at 16 kHz, less than one frame of 400"),
    (sound(np.array([0.1] * 500 + [np.nan, np.inf], np.float32)), "2 samples that are not finite"),
    (lambda: b"not a sound file", "not a readable sound file"),
])  # fmt: skip
def test_bad_audio_is_named(recording, message):
    with pytest.raises(cli.InputError, match=message):
        data.read_audio(recording)


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
        records[u.id] | {"speaker": u.speaker, "gender": u.gender, "age": u.age,
                         "audio": {"bytes": u.recording(), "path": f"{u.id}.WAV"}}
        for u in data.read_corpus(corpus, split)
    ]  # fmt: skip
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))


def test_the_hub_dataset_gives_the_same_utterances_as_the_folder(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    hub_table(corpus).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    folder = data.read_corpus(corpus, "test")
    hub = [data._utterance(**row, known={}) for _, row in data.read_hub("some/corpus", tmp_path, "test")]
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
    reasons += ["no 'fluency'", "total score 12", "index 99 is outside", "accuracy score None"]
    for id, line, reason in zip(ids[:9], lines[1:], reasons, strict=True):
        assert line.strip().startswith(f"{id}: ") and reason in line
    assert str(paths[0]) in lines[1]


@pytest.mark.parametrize("change, message", [
    (lambda record: record.update(text=None), "text None is not a sentence"),
    (lambda record: record.update(accuracy=7.5), "accuracy score 7.5 is not a whole number"),
    (lambda record: record.update(words=7), "wrong type"),
    (lambda record: record["words"][0].pop("mispronunciations"), "no 'mispronunciations'"),
])  # fmt: skip
def test_a_bad_record_is_named(corpus, tmp_path, change, message):
    root = copy(corpus, tmp_path)
    scores = root / "resource" / "scores.json"
    records = json.loads(scores.read_text())
    id = (root / "test" / "wav.scp").read_text().split()[0]
    change(records[id])
    scores.write_text(json.dumps(records))
    with pytest.raises(cli.InputError, match=f"{id}: .*{message}"):
        data.read_corpus(root, "test")


def test_a_value_that_is_not_json_is_located_by_the_utterance_before_it(corpus, tmp_path):
    root = copy(corpus, tmp_path)
    scores = root / "resource" / "scores.json"
    records = json.loads(scores.read_text())
    first, second = list(records)[:2]
    records[second]["accuracy"] = float("nan")
    scores.write_text(json.dumps(records))
    with pytest.raises(cli.InputError, match=f"scores.json is not a JSON object of utterances after utterance {first}"):
        data.read_corpus(root, "test")


@pytest.mark.parametrize("name, content, message", [
    ("wav.scp", "000500001\n", "line 1 of .*wav.scp is not a key and a value"),
    ("wav.scp", "u a.wav\nu a.wav\n", "line 2 of .*wav.scp repeats a key"),
    ("spk2age", "0005 six\n0006 7\n", "wrong type: .*'six'"),
    ("utt2spk", "nobody 0005\n", "no speaker, or none with age and gender"),
])  # fmt: skip
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
        {"text": "THEME", "phones": ["TH", "IY0", "M"], "accuracy": 2,
         "mispronunciations": [{"canonical-phone": "IY", "index": 1, "pronounced-phone": "<unk>"}]},
        {"text": "PARK", "phones": ["P", "AA0", "R", "K"], "accuracy": 10, "mispronunciations": []},
    ]  # fmt: skip
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


@pytest.mark.parametrize("error, code, line", [
    (cli.InputError("no such corpus"), 2, "x.py: error: no such corpus"),
    (cli.RunError("step 3: loss nan"), 1, "x.py: error: step 3: loss nan"),
    (OSError(28, "No space left on device"), 1, "x.py: error: [Errno 28] No space left on device"),
])  # fmt: skip
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


@pytest.mark.parametrize("audio, rate, message", [
    (np.zeros(4000), 8000, "8,000 Hz is below 16,000 Hz"),
    (np.zeros(40_000), 16_000, "2.50 s is longer than 2 s"),
    (np.ones(8000), 16_000, "100.0% of the samples are at full scale"),
    (np.zeros(0), 16_000, "recording is empty"),
])  # fmt: skip
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
