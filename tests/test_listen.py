import json
import os

from conftest import ROOT
import numpy as np
import pytest
import soundfile

from analysis import assessor, doubts, listen, pronunciations
import data
import evaluate
import prompts
from support import cli, sound


def tone(seconds=1.0, rate=sound.SAMPLE_RATE, amplitude=0.3):
    """A tone that swells and fades three times a second."""
    t = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * 3 * t) ** 2).astype(np.float32)


def written(path, audio, rate=sound.SAMPLE_RATE, subtype=None):
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


def question(path):
    return assessor.ask(path, None, []).utterance


def refusal(path):
    with pytest.raises(cli.InputError) as error:
        assessor.ask(path, None, [])
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
    utterance = question(path)
    assert utterance.id.endswith(name) and utterance.recording() == path.read_bytes() and utterance.tasks == ()
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
    assert "31.50 s is longer than 30 s" in refusal(written(tmp_path / "a.flac", tone(assessor.LONGEST + 1.5)))
    assert question(written(tmp_path / "b.flac", tone(assessor.LONGEST))).samples == 480_000


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
        assert question(path).samples == len(audio)


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
    assert question(written(tmp_path / "b.wav", audio)).samples == 16_000


# ----------------------------------------------------------------------------------------------------------------------
# The result, as JSON and on the terminal

PEAKED = [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0]
SENTENCE = [("WE", [("W", "IY")]), ("CALL", [("K", "AO", "L")]), ("IT", [("IH", "T")])]


def example(phones="W IY0 K AA l AH", words=SENTENCE, speech=2.0, rate=16_000, truncated=False, scores=PEAKED):
    asked = assessor.Question("my.wav", None, rate, speech, "we call it" if words else None, words)
    output = json.dumps({"word_transcript": "WE CALL AT", "phoneme_transcript": phones}) if phones else "hello"
    return assessor.result(asked, {name: list(scores) for name in prompts.SCORES}, output, truncated)


def codes(found):
    return [warning["code"] for warning in found["warnings"]]


@pytest.mark.parametrize(
    "how, code, scored",
    [
        ({"speech": 0.0}, "no_speech", False),
        ({"speech": 7 * 0.03}, "too_short", False),  # for 7 phones of the text
        ({"speech": 0.06, "words": None}, "too_short", False),  # for 6 phones heard
        ({"rate": 8_000}, "low_rate", True),
        ({"truncated": True}, "transcript_cut_off", True),
        ({"phones": None}, "transcript_unreadable", True),
        ({"phones": 'W VPHONEME_TRANSCRIPT":'}, "transcript_unreadable", True),
        ({"phones": "S IY M P AA R K"}, "another_sentence", False),
        ({"scores": [0] * 9 + [1, 0], "phones": "W IY K AO"}, "contradiction", None),
        ({"scores": [0, 0, 1] + [0] * 8, "phones": "W IY K AO L IH T"}, "contradiction", True),
    ],
)
def test_what_is_not_to_be_believed_has_a_warning_and_some_warnings_forbid_scores(how, code, scored):
    found = example(**how)
    scored = True if scored is None else scored
    assert codes(found) == [code] and bool(found["scores"]) == scored
    shown = listen.show(found, colour=False)
    assert f"warning: {found['warnings'][0]['message']}" in shown and ("no scores" in shown) != scored
    if code in doubts.NOTHING_HEARD:
        assert found["heard"] is found["words"] is None and "heard  " not in shown


@pytest.mark.parametrize("phones", ["W IY K AO L IH T", "W IY K AO L", "W <unk> K AO* L IH T"])
def test_an_answer_that_fits_has_no_warning(phones):
    assert example(phones)["warnings"] == []


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
    question(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert "cut off" in refusal(path) or "not a readable" in refusal(path)


def test_a_result_is_plain_json_with_the_fields_of_the_docs():
    found = example()
    assert json.loads(json.dumps(found)) == found
    table = (ROOT / "docs" / "scores.md").read_text()
    assert all(f"`{field}`" in table for field in (*found, *found["words"][0], "error"))
    assert list(found["scores"]) == list(prompts.SCORES)
    assert found["scores"]["accuracy"] == {"expected": 6.75, "mode": 6, "distribution": PEAKED}
    assert (found["version"], found["file"], found["text"]) == (1, "my.wav", "we call it")
    assert found["heard"] == {"words": "WE CALL AT", "phones": ["W", "IY", "K", "AA", "L", "AH"]}
    assert found["words"][2] == {
        "word": "IT",
        "ErrorType": "Mispronunciation",
        "share_of_phones_right": 0.0,
        "phones": [{"canonical": "IH", "heard": "AH"}, {"canonical": "T", "heard": None}],
    }


@pytest.mark.parametrize(
    "phones, errors",
    [
        ("W IY K AO L IH T", ["None", "None", "None"]),
        ("W IY K AA L IH T", ["None", "Mispronunciation", "None"]),
        ("W IY K AO IH T", ["None", "Mispronunciation", "None"]),
        ("K AO L IH T", ["Omission", "None", "None"]),
        ("W IY K AO L AH IH T", ["None", "Insertion", "None"]),
        ("W IY K AA L AH IH T", ["None", "Mispronunciation", "None"]),
    ],
)
def test_a_word_has_the_error_type_that_services_name(phones, errors):
    assert [word["ErrorType"] for word in example(phones)["words"]] == errors


def test_without_a_text_there_are_no_words():
    assert example(words=None)["words"] is None
    assert listen.show(example(words=None), colour=False).endswith("phones heard  W IY K AA L AH")


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


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Three recordings, and a file that is none."""
    folder = tmp_path_factory.mktemp("recordings")
    for i, utterance in enumerate(data.read_corpus(corpus, "test", limit=3)):
        (folder / f"{i}.wav").write_bytes(utterance.recording())
    (folder / "bad.wav").write_bytes(b"hello")
    lexicon = pronunciations.of_corpus(data.read_corpus(corpus, "train"))
    lines = [f"{word} {' '.join(phones)}" for word, variants in lexicon.items() for phones in variants]
    (folder / "words.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def assess(run, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return assessor.Assessor(run[0] / "out", [folder / "words.txt"], max_new_tokens=20)


def alike(first, second):
    """Whether two results are the same ones, probabilities to 1e-5."""
    scores = [
        [value for score in (found["scores"] or {}).values() for value in score["distribution"]]
        for found in (first, second)
    ]
    texts = [
        [(w["code"], f["heard"], f["words"]) for w in f["warnings"]] + [f["file"], f["heard"]] for f in (first, second)
    ]
    return texts[0] == texts[1] and scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_batch_has_the_results_of_single_recordings_and_a_bad_one_loses_no_other(assess, folder):
    files = [folder / name for name in ("0.wav", "bad.wav", "1.wav", "2.wav")]
    texts = ["we see it", "we", None, "nowhere xqzzt"]
    first, bad, second, unknown = assess(files, texts)
    assert alike(first, assess(files[0], "we see it")) and alike(second, assess(files[2]))
    assert alike(assess(files[2].read_bytes()) | {"file": str(files[2])}, second)
    assert set(bad) == {"version", "file", "error"} and "not a readable sound file" in bad["error"]
    assert "XQZZT" in unknown["error"]
    with pytest.raises(cli.InputError, match="not a readable sound file"):
        assess(files[1])


def test_an_own_recording_is_shown_with_its_words(monkeypatch, run, folder, capsys):
    main(monkeypatch, folder / "0.wav", "--text", "we see it", "--adapter", run[0] / "out", "--max-new-tokens", 20)
    printed = capsys.readouterr().out
    assert str(folder / "0.wav") in printed and "\x1b[" not in printed


def test_recordings_with_a_text_each_are_printed_as_json_and_a_bad_one_ends_with_1(monkeypatch, run, folder, capsys):
    (folder / "texts.tsv").write_text("0.wav\twe see it\nbad.wav\twe\n1.wav\n")
    with pytest.raises(cli.RunError, match=r"1 of 3 recordings cannot be used: .*bad.wav"):
        main(
            monkeypatch, "--texts", folder / "texts.tsv", "--json", "--adapter", run[0] / "out", "--max-new-tokens", 20
        )
    first, bad, last = json.loads(capsys.readouterr().out)
    assert first["text"] == "we see it" and last["text"] is None and "not a readable" in bad["error"]
    assert len(first["scores"]["total"]["distribution"]) == 11 if first["scores"] else first["warnings"]


def test_a_mistake_is_json_too(monkeypatch, capsys):
    with pytest.raises(cli.InputError):
        main(monkeypatch, "x.wav", "--base", "--json")
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed == {
        "version": assessor.VERSION,
        "error": "x.wav is not a file: give a recording (WAV, FLAC, MP3, Ogg)",
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x.wav"], "give --adapter"),
        (["x.wav", "--base", "--texts", "t.tsv"], "--texts names recordings"),
        (["--base"], "give one or more sound files"),
        (["x.wav", "--base"], "x.wav is not a file"),
        (["x.wav", "--base", "--text", "it xqzzt", "--pronunciations", "none.txt"], "none.txt"),
        (["x.wav", "--base", "--pronunciations", "none.txt"], "add --text"),
        (["x.wav", "--base", "--limit", "3"], "--limit"),
        (["x.wav", "--adapter", "out", "--epochs", "all"], "leave out --epochs all"),
        (["x.wav", "--adapter", "out", "--base"], "give --adapter or --base"),
    ],
)
def test_a_users_mistake_is_named_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(evaluate, "load", None)
    with pytest.raises(cli.InputError, match=message):
        main(monkeypatch, *arguments)
