import json
import math
import os

import numpy as np
import pytest
import soundfile

import data
import feedback
import prompts
from support import cli


def speech(seconds=1.0, rate=data.SAMPLE_RATE, amplitude=0.3):
    """A tone that swells and fades three times a second."""
    t = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * 3 * t) ** 2).astype(np.float32)


def written(path, audio, rate=data.SAMPLE_RATE):
    soundfile.write(path, audio, rate)
    return path


def refusal(path):
    with pytest.raises(cli.InputError) as error:
        feedback.read_recording(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Reading a recording


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_a_recording_of_any_format_rate_and_channels_is_read_as_one_utterance(tmp_path, name, rate, channels):
    audio = speech(1.0, rate)
    path = written(tmp_path / name, np.stack([audio] * channels, axis=1), rate)
    utterance = feedback.read_recording(path)
    assert utterance.id == name and utterance.recording() == path.read_bytes()
    assert utterance.samples == pytest.approx(data.SAMPLE_RATE, rel=0.1)  # MP3 adds a frame of silence
    assert utterance.samples == len(data.read_audio(utterance.recording))
    assert (utterance.text, utterance.scores, utterance.words) == ("", {}, ())
    level = np.std(data.read_audio(utterance.recording))
    assert level == pytest.approx(np.std(audio), rel=0.1)


def test_a_path_may_be_text(tmp_path):
    assert feedback.read_recording(str(written(tmp_path / "a.wav", speech()))).id == "a.wav"


def test_a_missing_file_a_folder_and_a_fifo_are_named(tmp_path):
    assert "is not a file" in refusal(tmp_path / "none.wav")
    assert "is not a file" in refusal(tmp_path)
    assert "is not a file" in refusal(tmp_path / ("a" * 5000))
    os.mkfifo(tmp_path / "fifo.wav")
    assert "is not a file" in refusal(tmp_path / "fifo.wav")


def test_a_wav_that_was_cut_off_is_refused(tmp_path):
    path = written(tmp_path / "a.wav", speech())
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut off: its header says 32,000 bytes of sound, 31,000 are there" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"RIFF but no more", b"hello" * 1000])
def test_a_file_that_is_no_sound_is_named(tmp_path, content):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    assert "not a readable sound file" in refusal(path)


def test_a_sound_file_without_samples_or_with_less_than_one_frame_is_named(tmp_path):
    assert "is empty" in refusal(written(tmp_path / "a.wav", speech(0)))
    assert "less than one frame" in refusal(written(tmp_path / "a.wav", speech()[: data.FRAME - 1]))


def test_a_recording_that_is_too_long_tells_its_length_and_the_limit(tmp_path):
    message = refusal(written(tmp_path / "a.flac", speech(feedback.LONGEST + 1.5)))
    assert "31.50 s is longer than 30 s" in message
    assert feedback.read_recording(written(tmp_path / "b.flac", speech(feedback.LONGEST))).samples == 480_000


@pytest.mark.parametrize(
    "audio, level",
    [
        (np.zeros(16_000), "-120.0"),
        (np.full(16_000, 0.2), "-120.0"),  # a constant offset is not sound
        (speech(1, amplitude=0.001), "-67.3"),  # mean square of sin^2 * sin^4: 1/2 * 3/8, -7.3 dB
    ],
)
def test_silence_tells_its_level(tmp_path, audio, level):
    path = tmp_path / "a.wav"
    soundfile.write(path, audio, data.SAMPLE_RATE, subtype="FLOAT")
    assert f"level {level} dBFS is silence (limit -60 dBFS)" in refusal(path)


def test_quiet_speech_is_not_silence(tmp_path):
    assert feedback.read_recording(written(tmp_path / "a.wav", speech(amplitude=0.005))).samples == 16_000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_clipped_recording_is_refused_in_every_format(tmp_path, name, rate):
    clipped = np.clip(speech(1, rate, amplitude=3), -1, 1)
    assert "at full scale" in refusal(written(tmp_path / name, clipped, rate))


def test_clipping_tells_its_share(tmp_path):
    audio = speech(1)
    audio[:320] = 1.0
    assert "2.0% of the samples are at full scale (limit 1%)" in refusal(written(tmp_path / "a.wav", audio))
    audio[80:] = speech(1)[80:]  # half a percent is left
    assert feedback.read_recording(written(tmp_path / "a.wav", audio)).samples == 16_000


def test_one_clipped_channel_is_enough(tmp_path):
    both = np.stack([np.clip(speech(amplitude=3), -1, 1), np.zeros(16_000, np.float32)], axis=1)
    assert "at full scale" in refusal(written(tmp_path / "a.wav", both))


# ----------------------------------------------------------------------------------------------------------------------
# Words and marks


def test_words_get_the_first_pronunciation_of_the_dictionary_without_stress():
    words = feedback.canonical_words("We call it bear, that’s it!")
    assert [word.text for word in words] == ["WE", "CALL", "IT", "BEAR", "THAT'S", "IT"]
    assert [" ".join(word.canonical) for word in words] == ["W IY", "K AO L", "IH T", "B EH R", "DH AE T S", "IH T"]
    assert all(word.heard == () and math.isnan(word.accuracy) for word in words)


def test_every_word_that_the_dictionary_lacks_is_named_once():
    with pytest.raises(cli.InputError, match=r"lacks XQZZT, 42, BRRRK: "):
        feedback.canonical_words("we xqzzt it 42 xqzzt brrrk")


@pytest.mark.parametrize("text", ["", " ", "?!"])
def test_a_text_without_words_is_an_error_that_shows_it(text):
    with pytest.raises(cli.InputError, match="has no words"):
        feedback.canonical_words(text)


def words(*canonical):
    return [data.Word(f"W{i}", tuple(phones.split()), (), 0.0, 0) for i, phones in enumerate(canonical)]


@pytest.mark.parametrize(
    "heard, marks",
    [
        ("TH IY M P AA R K", ["TH IY M", "P AA R K"]),
        ("S IY M P AA R K", ["TH>S IY M", "P AA R K"]),
        ("TH IY M P AA L K", ["TH IY M", "P AA R>L K"]),
        ("TH IY M P AA R T", ["TH IY M", "P AA R K>T"]),
        ("IY M P AA R K", ["-TH IY M", "P AA R K"]),
        ("TH IY M AA R K", ["TH IY M", "-P AA R K"]),
        ("TH IY M P AA R", ["TH IY M", "P AA R -K"]),
        ("AH TH IY M P AA R K", ["+AH TH IY M", "P AA R K"]),  # none before it: the first word
        ("TH IY M AH P AA R K", ["TH IY M +AH", "P AA R K"]),  # between two words: the one before
        ("TH IY M P AA AH R K", ["TH IY M", "P AA +AH R K"]),
        ("TH IY M P AA R K AH S", ["TH IY M", "P AA R K +AH +S"]),
        ("S IY P AA R K AH", ["TH>S IY -M", "P AA R K +AH"]),
        ("P AA R K", ["-TH -IY -M", "P AA R K"]),
        ("TH <unk> M P AA R* K", ["TH IY><unk> M", "P AA R>R* K"]),
        ("", ["-TH -IY -M", "-P -AA -R -K"]),
    ],
)
def test_marks_say_what_became_of_every_phone(heard, marks):
    found = feedback.compare(words("TH IY M", "P AA R K"), heard.split())
    assert [" ".join(feedback._mark(*mark, colour=False) for mark in word) for word in found] == marks


def test_a_mark_holds_its_kind_and_both_phones():
    assert feedback.compare(words("TH IY M"), ["S", "IY", "AH"]) == [
        [("substituted", "TH", "S"), ("same", "IY", "IY"), ("substituted", "M", "AH")]
    ]
    assert feedback.compare(words("T", "D AH"), ["D", "AH", "N"]) == [
        [("missing", "T", None)],
        [("same", "D", "D"), ("same", "AH", "AH"), ("added", None, "N")],
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The result, as JSON and on the terminal

PEAKED = [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0]
TRANSCRIPT = {"word_transcript": "WE CALL AT", "phoneme_transcript": "W IY0 K AA l AH"}


SENTENCE = [
    data.Word(word, tuple(phones.split()), (), math.nan, 0)
    for word, phones in (("WE", "W IY"), ("CALL", "K AO L"), ("IT", "IH T"))
]


def example(transcript=TRANSCRIPT, sentence=SENTENCE):
    distributions = {name: list(PEAKED) for name in prompts.SCORES}
    return feedback.result("my.wav", distributions, transcript, sentence)


def test_a_result_is_plain_json():
    found = example()
    assert json.loads(json.dumps(found)) == found
    assert list(found["scores"]) == list(prompts.SCORES)
    assert found["scores"]["accuracy"] == {"expected": 6.75, "mode": 6, "distribution": PEAKED}
    assert (found["file"], found["word_transcript"]) == ("my.wav", "WE CALL AT")
    assert found["phones"] == ["W", "IY", "K", "AA", "L", "AH"]
    assert found["words"][2] == {
        "word": "IT",
        "canonical": ["IH", "T"],
        "marks": [["missing", "IH", None], ["substituted", "T", "AH"]],
    }


def test_numpy_probabilities_become_plain_numbers():
    found = feedback.result("my.wav", {"total": np.array(PEAKED, np.float32)}, None, None)
    assert json.loads(json.dumps(found))["scores"]["total"] == found["scores"]["total"]


def test_an_unparsed_transcript_leaves_scores_and_no_marks():
    found = example(transcript=None)
    assert found["word_transcript"] is None and found["phones"] is None and "words" not in found
    assert "could not be read" in feedback.show(found, colour=False)


def test_without_a_text_there_are_no_words():
    assert "words" not in example(sentence=None)
    assert feedback.show(example(sentence=None), colour=False).endswith("phones heard  W IY K AA L AH")


def test_the_terminal_shows_scores_transcript_and_marks():
    lines = feedback.show(example(), colour=False).splitlines()
    assert lines == [
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
        "IT    -IH T>AH",
        "",
        feedback.LEGEND,
    ]


def test_a_bar_stands_for_each_score():
    assert feedback._bars([1 / 11] * 11) == "█" * 11
    assert feedback._bars([0] * 10 + [1]) == " " * 10 + "█"


def test_a_score_without_a_distribution_has_no_bars():
    found = example()
    del found["scores"]["total"]["distribution"]
    assert "total            6.8            6" in feedback.show(found, colour=False).splitlines()


def test_colour_comes_only_when_asked_and_changes_no_text():
    plain, coloured = (feedback.show(example(), colour=colour) for colour in (False, True))
    assert "\x1b" not in plain and "\x1b[31mAO>AA\x1b[0m" in coloured
    for code in {*feedback.ANSI.values(), "0"}:
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain
