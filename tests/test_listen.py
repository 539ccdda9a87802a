"""What is said of a person's recording, and when it is not to be believed."""

from dataclasses import asdict
import json
import os
from pathlib import Path
import shutil
import sys

from conftest import ROOT, call, sound
import numpy as np
import pytest
import torch

from analysis import assessor, listen, pronunciations
import data
import evaluate
import prompts
from support import cli
from support.sound import SAMPLE_RATE, read_audio

pytestmark = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")

# ----------------------------------------------------------------------------------------------------------------------
# The result, as JSON and on the terminal

PEAKED = [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0]
SENTENCE = [("WE", [("W", "IY")]), ("CALL", [("K", "AO", "L")]), ("IT", [("IH", "T")])]


def example(phones="W IY0 K AA l AH", words=SENTENCE, speech=2.0, rate=16_000, truncated=False, scores=PEAKED):
    utterance = data.Utterance("my.wav", None, 32_000, "", None, (), "")
    asked = assessor.Question(utterance, rate, speech, (0.0, 1.25), "we call it" if words else None, words)
    output = json.dumps({"word_transcript": "WE CALL AT", "phoneme_transcript": phones}) if phones else "hello"
    return assessor.result(asked, {name: list(scores) for name in prompts.SCORES}, output, truncated)


@pytest.mark.parametrize(
    "how, code, scored",
    [
        ({"speech": 0.0}, "no_speech", False),
        ({"speech": 7 * 0.03}, "too_short", False),  # for 7 phones of the text
        ({"rate": 8_000}, "low_rate", True),
        ({"truncated": True}, "transcript_cut_off", True),
        ({"phones": None}, "transcript_unreadable", True),
        ({"phones": "S IY M P AA R K"}, "another_sentence", False),
        ({"scores": [0] * 9 + [1, 0], "phones": "W IY K AO"}, "contradiction", True),
        ({"scores": [0, 0, 1] + [0] * 8, "phones": "W IY K AO L IH T"}, "contradiction", True),
        ({"phones": "W <unk> K AO* L IH T"}, None, True),
    ],
)
def test_what_is_not_to_be_believed_has_a_warning_and_some_forbid_scores(how, code, scored):
    found = example(**how)
    assert [warning.code for warning in found.warnings] == ([code] if code else [])
    shown = listen.show(found, colour=False)
    assert bool(found.scores) == scored == ("no scores" not in shown) and ("warning: " in shown) == bool(code)
    if code in assessor.NOTHING_HEARD:
        assert found.heard is found.words is None and "heard  " not in shown


def test_a_result_is_plain_json_with_the_fields_of_the_docs():
    found = json.loads(json.dumps(asdict(example())))
    table = (ROOT / "docs" / "scores.md").read_text()
    phone = {"canonical": "IH", "heard": "AH", "canonical_ipa": "ɪ", "heard_ipa": "ʌ"}
    assert all(f"`{field}`" in table for field in (*found, *found["words"][0], *phone, "error"))
    assert list(found["scores"]) == list(prompts.SCORES)
    assert found["scores"]["accuracy"] == {"expected": 6.75, "mode": 6, "distribution": PEAKED}
    assert found["words"][2] == {
        "word": "IT",
        "ErrorType": "Mispronunciation",
        "accuracy": 0.0,
        "phones": [phone, {"canonical": "T", "heard": None, "canonical_ipa": "t", "heard_ipa": None}],
    }


@pytest.mark.parametrize(
    "phones, errors, accuracies, completeness",
    [
        ("W IY K <unk> IH T", ["None", "Mispronunciation", "None"], [1, 1 / 3, 1], 1),
        ("K AO L IH T", ["Omission", "None", "None"], [0, 1, 1], 2 / 3),
        ("W IY K AO L AH IH T", ["None", "Insertion", "None"], [1, 1, 1], 1),
    ],
)
def test_a_word_has_its_error_and_accuracy_and_the_sentence_its_completeness(phones, errors, accuracies, completeness):
    found = example(phones)
    assert [word.ErrorType for word in found.words] == errors and found.completeness == completeness
    assert [word.accuracy for word in found.words] == accuracies
    assert found.heard.ipa == [pronunciations.PHONES.get(phone) for phone in phones.split()]


def test_the_terminal_shows_scores_transcript_and_marks():
    plain, coloured = (listen.show(example(), colour=colour) for colour in (False, True))
    lines = plain.splitlines()
    assert lines[:2] == ["my.wav", "left out: 0.0 s of silence before speech, 1.2 s after"]
    assert [line.split() for line in lines[4:8]] == [[name, "6.8", "6", "█▄▄"] for name in prompts.SCORES]
    assert lines[9:17] == [
        *("words heard   WE CALL AT", "phones heard  W IY K AA L AH", "in IPA        w i k ɑ l ʌ"),
        *("completeness  100%: 3 of 3 words were said", ""),
        *("WE    100%  W IY        w i", "CALL   67%  K AO>AA L   k ɔ>ɑ l", "IT      0%  IH>AH -T    ɪ>ʌ -t"),
    ]
    assert "\x1b" not in plain and "\x1b[31mAO>AA\x1b[0m" in coloured


# ----------------------------------------------------------------------------------------------------------------------
# Speech in a recording


def test_noise_and_tones_are_no_speech_and_the_detector_leaves_torchs_threads(monkeypatch):
    monkeypatch.delitem(sys.modules, "silero_vad.model", raising=False)  # which sets them when it is imported
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    assessor._detector.cache_clear()
    torch.set_num_threads(2)
    noise = 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    swelling = np.sin(np.arange(32_000) / 11) * np.sin(np.arange(32_000) / 1_700) ** 2
    assert assessor.find_speech(noise) == assessor.find_speech(swelling.astype(np.float32)) == []
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("before, after", [(0.5, 0.5), (0.5, 3.0), (2.0, 2.0)])
@pytest.mark.parametrize("missed", [False, True])
def test_silence_beyond_the_corpus_margins_is_left_out_and_a_missed_word_is_not(monkeypatch, before, after, missed):
    noise = np.random.default_rng(0).standard_normal(round((before + 1 + after) * SAMPLE_RATE)).astype(np.float32)
    start, end = round(before * SAMPLE_RATE), round((before + 1) * SAMPLE_RATE)
    level = np.full(len(noise), 1e-3)
    level[start:end] = 0.1
    if missed:  # by the detector: a word 50 ms from each end
        level[800:2_400] = level[-2_400:-800] = 0.05
    monkeypatch.setattr(assessor, "find_speech", lambda audio: [(start, end)])
    asked = assessor.ask(sound(noise * level), None, [])
    left = (0, 0) if missed else (max(0, before - 0.8), max(0, after - 0.7))
    assert asked.trimmed == pytest.approx(left) and asked.speech == 1
    first = round(left[0] * SAMPLE_RATE)
    expected = (noise * level)[first : len(noise) - round(left[1] * SAMPLE_RATE)]
    assert np.allclose(read_audio(asked.utterance.recording), expected) and asked.utterance.samples == len(expected)


@pytest.mark.skipif("SPEECHOCEAN762" not in os.environ, reason="SPEECHOCEAN762 does not name a corpus folder")
def test_real_speech_is_speech_and_stays_whole():
    for utterance in data.read_corpus(Path(os.environ["SPEECHOCEAN762"]), "test", limit=10):
        asked = assessor.ask(utterance.recording(), None, [])
        assert asked.speech > 2 * assessor.FASTEST * len(utterance.canonical) and sum(asked.trimmed) < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Three recordings, and a file that is none."""
    folder = tmp_path_factory.mktemp("recordings")
    for i, utterance in enumerate(data.read_corpus(corpus, "test", limit=3)):
        (folder / f"{i}.wav").write_bytes(utterance.recording())
    (folder / "bad.wav").write_bytes(b"hello")
    (folder / "words.txt").write_text("WE W IY\nSEE S IY\nIT IH T\n")
    return folder


def test_a_batch_has_the_results_of_single_recordings_and_a_bad_one_loses_no_other(run, folder):
    settings = evaluate.ModelSettings(adapter=run[0] / "out", max_new_tokens=20)
    assess = assessor.Assessor(settings, [folder / "words.txt"])
    files = [folder / name for name in ("0.wav", "bad.wav", "1.wav", "2.wav")]
    first, bad, second, unknown = assess(files, ["we see it", "we", None, "nowhere xqzzt"])
    assert "not a readable sound file" in bad.error and "XQZZT" in unknown.error
    for batched, single in ((first, assess(files[0], "we see it")), (second, assess(files[2].read_bytes()))):
        for ours, alone in zip((batched.scores or {}).values(), (single.scores or {}).values(), strict=True):
            assert ours.distribution == pytest.approx(alone.distribution, abs=1e-5)
        assert (batched.heard, batched.words) == (single.heard, single.words)


def test_without_an_adapter_the_runs_that_are_here_are_named(monkeypatch, tmp_path):
    for name in ("out/epoch-1", "seeds/seed-0/epoch-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "settings.json").touch()
    with pytest.raises(cli.InputError, match="here are --adapter out, --adapter seeds/seed-0; --base takes"):
        call(monkeypatch, listen, "a.wav")


def test_recordings_with_a_text_each_are_json_and_a_bad_one_ends_with_1(monkeypatch, run, folder, capsys):
    text = "we see\u2028it"  # one line: another end than \n is none
    (folder / "texts.tsv").write_text(f"\ufeff0.wav\t{text}\nbad.wav\twe\n1.wav\n")
    arguments = ["--adapter", run[0] / "out", "--max-new-tokens", 20]
    with pytest.raises(cli.RunError, match=r"1 of 3 recordings cannot be used: .*bad.wav"):
        call(monkeypatch, listen, "--texts", folder / "texts.tsv", "--json", *arguments)
    first, bad, last = json.loads(capsys.readouterr().out)
    assert first["text"] == text and last["text"] is None and set(bad) == {"file", "error", "version"}
    call(monkeypatch, listen, folder / "0.wav", *arguments)
    assert str(folder / "0.wav") in (printed := capsys.readouterr().out) and "\x1b[" not in printed
