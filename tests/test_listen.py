import json
import os

import numpy as np
import pytest
import soundfile

from analysis import doubts, listen
import data
import prompts
from support import cli, sound


def tone(seconds=1.0, rate=sound.SAMPLE_RATE, amplitude=0.3):
    """A tone that swells and fades three times a second."""
    t = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * 3 * t) ** 2).astype(np.float32)


def written(path, audio, rate=sound.SAMPLE_RATE, subtype=None):
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


def refusal(path):
    with pytest.raises(cli.InputError) as error:
        listen.read_recording(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Reading a recording; what a sound file must be: tests/test_data.py


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_a_recording_of_any_format_rate_and_channels_is_read_as_one_utterance(tmp_path, name, rate, channels):
    audio = tone(1.0, rate)
    path = written(tmp_path / name, np.stack([audio] * channels, axis=1), rate)
    utterance = listen.read_recording(path)
    assert utterance.id == name and utterance.recording() == path.read_bytes() and utterance.tasks == ()
    assert utterance.samples == pytest.approx(sound.SAMPLE_RATE, rel=0.1)  # MP3 adds a frame of silence
    assert utterance.samples == len(sound.read_audio(utterance.recording))
    assert np.std(sound.read_audio(utterance.recording)) == pytest.approx(np.std(audio), rel=0.1)


def test_a_missing_file_a_folder_and_a_fifo_are_named(tmp_path):
    os.mkfifo(tmp_path / "fifo.wav")
    for path in (tmp_path / "none.wav", tmp_path, tmp_path / ("a" * 5000), tmp_path / "fifo.wav"):
        assert "is not a file" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"RIFF but no more", b"hello" * 1000])
def test_a_file_that_is_no_sound_is_named(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    assert "not a readable sound file" in refusal(tmp_path / "a.wav")


def test_a_recording_that_was_cut_off_is_empty_or_too_short_is_refused(tmp_path):
    path = written(tmp_path / "a.wav", tone())
    path.write_bytes(path.read_bytes()[:-1000])
    assert "32,000 bytes of sound, 31,000 are there" in refusal(path)
    assert "is empty" in refusal(written(tmp_path / "b.wav", tone(0)))
    assert "less than one frame" in refusal(written(tmp_path / "c.wav", tone()[: sound.FRAME - 1]))


def test_a_recording_that_is_too_long_tells_its_length_and_the_limit(tmp_path):
    assert "31.50 s is longer than 30 s" in refusal(written(tmp_path / "a.flac", tone(listen.LONGEST + 1.5)))
    assert listen.read_recording(written(tmp_path / "b.flac", tone(listen.LONGEST))).samples == 480_000


@pytest.mark.parametrize(
    "audio, level",
    [
        (np.zeros(16_000), "-120.0"),
        (np.full(16_000, 0.2), "-120.0"),  # a constant offset is not sound
        (tone(1, amplitude=0.001), "-67.3"),  # mean square of sin^2 * sin^4: 1/2 * 3/8, -7.3 dB
        (tone(1, amplitude=0.005), None),  # quiet speech
    ],
)
def test_silence_tells_its_level(tmp_path, audio, level):
    path = written(tmp_path / "a.wav", audio, subtype="FLOAT")
    if level:
        assert f"level {level} dBFS is silence (limit -60 dBFS)" in refusal(path)
    else:
        assert listen.read_recording(path).samples == len(audio)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_clipped_recording_is_refused_in_every_format(tmp_path, name, rate):
    assert "at full scale" in refusal(written(tmp_path / name, np.clip(tone(1, rate, amplitude=3), -1, 1), rate))


def test_clipping_of_one_channel_is_enough_and_tells_its_share(tmp_path):
    audio = tone(1)
    audio[:320] = 1.0
    both = np.stack([audio, np.zeros(16_000, np.float32)], axis=1)
    assert "2.0% of the samples are at full scale (limit 1%)" in refusal(written(tmp_path / "a.wav", both))
    audio[80:] = tone(1)[80:]  # half a percent is left
    assert listen.read_recording(written(tmp_path / "b.wav", audio)).samples == 16_000


# ----------------------------------------------------------------------------------------------------------------------
# The result, as JSON and on the terminal

PEAKED = [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0]
TRANSCRIPT = {"word_transcript": "WE CALL AT", "phoneme_transcript": "W IY0 K AA l AH"}
SENTENCE = [("WE", [("W", "IY")]), ("CALL", [("K", "AO", "L")]), ("IT", [("IH", "T")])]


def example(transcript=TRANSCRIPT, sentence=SENTENCE, speech=2.0, rate=16_000, truncated=False, scores=PEAKED):
    scores = {name: list(scores) for name in prompts.SCORES}
    return listen.result("my.wav", scores, transcript, sentence, speech, rate, truncated)


def codes(found):
    return [warning["code"] for warning in found["warnings"]]


def read(phones):
    return {"word_transcript": "X", "phoneme_transcript": phones}


@pytest.mark.parametrize(
    "how, code, scored",
    [
        ({"speech": 0.0}, "no_speech", False),
        ({"speech": 8 * 0.03}, "too_short", False),  # for 8 phones of the text
        ({"speech": 0.06, "sentence": None}, "too_short", False),  # for 6 phones heard
        ({"rate": 8_000}, "low_rate", True),
        ({"truncated": True}, "transcript_cut_off", True),
        ({"transcript": None}, "transcript_unreadable", True),
        ({"transcript": read('W VPHONEME_TRANSCRIPT":')}, "transcript_unreadable", True),
        ({"transcript": read("S IY M P AA R K")}, "another_sentence", False),
        ({"scores": [0] * 9 + [1, 0], "transcript": read("W IY K AO")}, "contradiction", True),
        ({"scores": [0, 0, 1] + [0] * 8, "transcript": read("W IY K AO L IH T")}, "contradiction", True),
    ],
)
def test_what_is_not_to_be_believed_has_a_warning_and_some_warnings_forbid_scores(how, code, scored):
    found = example(**how)
    assert codes(found) == [code] and bool(found["scores"]) == scored
    shown = listen.show(found, colour=False)
    assert f"warning: {found['warnings'][0]['message']}" in shown and ("no scores" in shown) != scored


@pytest.mark.parametrize("phones", ["W IY K AO L IH T", "W IY K AO L", "W <unk> K AO* L IH T"])
def test_an_answer_that_fits_has_no_warning(phones):
    assert example(transcript=read(phones))["warnings"] == []


def test_noise_and_tones_are_no_speech_and_the_threads_of_torch_stay():
    import torch

    threads = torch.get_num_threads()
    noise = 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    assert doubts.speech_seconds(noise) == doubts.speech_seconds(tone(2)) == 0.0
    assert torch.get_num_threads() == threads


@pytest.mark.skipif("SPEECHOCEAN762" not in os.environ, reason="SPEECHOCEAN762 does not name a corpus folder")
def test_real_speech_is_speech():
    for utterance in data.read_corpus(os.environ["SPEECHOCEAN762"], "test", limit=10):
        speech = doubts.speech_seconds(sound.read_audio(utterance.recording))
        assert speech > 2 * doubts.FASTEST * len(utterance.canonical)


@pytest.mark.parametrize("name", ["a.mp3", "a.ogg", "a.flac"])
def test_a_compressed_recording_that_was_cut_off_is_refused(tmp_path, name):
    path = written(tmp_path / name, tone(12))
    listen.read_recording(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert "cut off" in refusal(path) or "not a readable" in refusal(path)


def test_a_result_is_plain_json():
    found = example()
    assert json.loads(json.dumps(found)) == found
    assert list(found["scores"]) == list(prompts.SCORES)
    assert found["scores"]["accuracy"] == {"expected": 6.75, "mode": 6, "distribution": PEAKED}
    assert (found["file"], found["word_transcript"]) == ("my.wav", "WE CALL AT")
    assert found["phones"] == ["W", "IY", "K", "AA", "L", "AH"]
    marks = [["substituted", "IH", "AH"], ["missing", "T", None]]
    assert found["words"][2] == {"word": "IT", "canonical": ["IH", "T"], "marks": marks}


def test_an_unparsed_transcript_leaves_scores_and_no_marks():
    found = example(transcript=None)
    assert found["word_transcript"] is None and found["phones"] is None and "words" not in found
    assert found["scores"] and codes(found) == ["transcript_unreadable"]
    assert "cannot be read" in listen.show(found, colour=False)


def test_without_a_text_there_are_no_words():
    assert "words" not in example(sentence=None)
    assert listen.show(example(sentence=None), colour=False).endswith("phones heard  W IY K AA L AH")


def test_the_terminal_shows_scores_transcript_and_marks():
    assert listen.show(example(), colour=False).splitlines() == [
        "my.wav",
        "",
        "            expected  most likely  0        10",
        *(f"{name:10}       6.8            6        █▄▄" for name in prompts.SCORES),
        "",
        "words heard   WE CALL AT",
        "phones heard  W IY K AA L AH",
        "",
        "WE    W IY",
        "CALL  K AO>AA L",
        "IT    IH>AH -T",
        "",
        listen.LEGEND,
    ]


def test_a_bar_stands_for_each_score():
    assert listen._bars([1 / 11] * 11) == "█" * 11
    assert listen._bars([0] * 10 + [1]) == " " * 10 + "█"


def test_colour_comes_only_when_asked_and_changes_no_text():
    plain, coloured = (listen.show(example(), colour=colour) for colour in (False, True))
    assert "\x1b" not in plain and "\x1b[31mAO>AA\x1b[0m" in coloured
    for code in {*listen.ANSI.values(), "0"}:
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["analysis.listen", *map(str, arguments)])
    listen.main()


@pytest.mark.parametrize("as_json", [True, False])
def test_an_own_recording_is_assessed_and_its_words_marked(monkeypatch, run, corpus, tmp_path, capsys, as_json):
    (tmp_path / "my.wav").write_bytes(data.read_corpus(corpus, "test", limit=1)[0].recording())
    arguments = ["--text", "we see it", "--adapter", run[0] / "out", "--max-new-tokens", 20, *["--json"] * as_json]
    main(monkeypatch, tmp_path / "my.wav", *arguments)
    printed = capsys.readouterr().out
    if as_json:
        (result,) = json.loads(printed)
        assert result["file"] == "my.wav" and len(result["scores"]["total"]["distribution"]) == 11
    else:
        assert "my.wav" in printed and "accuracy" in printed and "\x1b[" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x.wav"], "give --adapter"),
        (["--base"], "give one or more sound files"),
        (["x.wav", "--base"], "x.wav is not a file"),
        (["x.wav", "--base", "--text", "?"], "no words"),
        (["x.wav", "--base", "--text", "it xqzzt", "--pronunciations", "none.txt"], "none.txt"),
        (["x.wav", "--base", "--pronunciations", "none.txt"], "of the words of --text"),
        (["x.wav", "--base", "--limit", "3"], "--limit"),
        (["x.wav", "--adapter", "out", "--epochs", "all"], "leave out --epochs all"),
        (["x.wav", "--adapter", "out", "--base"], "give --adapter or --base"),
    ],
)
def test_a_users_mistake_is_named_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(listen.evaluate, "load", None)
    with pytest.raises(cli.InputError, match=message):
        main(monkeypatch, *arguments)
