"""What can be asked of predictions afterwards, and what reading them refuses. The report: test_report.py."""

import json
import math
import shutil

from conftest import ROOT, call, script, tone
import numpy as np
import pytest
from records import copying, one_hot, records, write
from sklearn.linear_model import LinearRegression

from analysis import ablation, floors
import data
import prompts
from support import answers, cli
from support.sound import read_audio

RATE = data.SAMPLE_RATE
FRAME_LENGTH = data.FRAME / RATE  # seconds; a pause is known to within one frame


def test_no_command_on_evaluated_folders_loads_a_model_and_scores_alone_are_enough(copied, corpus, tmp_path):
    for name in ("a", "b", "scores"):
        (tmp_path / name).mkdir()
        shutil.copy(copied, tmp_path / name)
    scores = [line for line in answers.read(copied) if line["task"] == "APA"]
    write(tmp_path / "scores" / "predictions.jsonl", scores)
    commands = [
        ("evaluate", ["--predictions", "a/predictions.jsonl"]),
        ("analysis.compare", ["a", "--against", "b/predictions.jsonl"]),
        ("analysis.floors", ["a/predictions.jsonl", "--data", str(corpus)]),
        ("analysis.phones", ["a/predictions.jsonl"]),
        ("analysis.report", ["a", "--data", str(corpus)]),
        ("evaluate", ["--predictions", "scores/predictions.jsonl"]),
        ("analysis.floors", ["scores/predictions.jsonl", "--data", str(corpus)]),
        ("analysis.report", ["scores", "--data", str(corpus)]),
    ]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name, arguments in {commands}:\n"
        "    sys.argv = [name, *arguments]; runpy.run_module(name, run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    result = script("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no accuracy_pcc: all 12 predicted scores are 5" in result.stdout
    saved = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert saved["accuracy_pcc"] is None and saved["wer"] == 0 and (tmp_path / "a" / "report.html").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Reading predictions and metrics


def changed(number, **changes):
    """Some records, one of them changed, as the content of a file."""
    lines = records()
    lines[number] |= changes
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def relabelled(number, **changes):
    return changed(number, reference=records()[number]["reference"] | changes)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (changed(0)[:-20], "line 12 of"),
        (changed(0).replace(b"\n", b"\n\n", 1), "line 2 of"),
        (changed(2, id=3), "line 3 of .*id 3"),
        (changed(0, task="ASR"), "line 1 of .*ASR"),
        (changed(0, reference={"accuracy": 1}), "line 1 of .*fluency is missing"),
        (relabelled(0, total=11), "line 1 of .*total 11"),
        (relabelled(0, total=math.nan), "line 1 of .*total nan"),
        (relabelled(1, heard=["W IH"]), "line 2 of .*heard.0 'W IH'"),
        (relabelled(1, heard=["\udc00"]), "line 2 of"),
        (changed(0, scores=one_hot(10) | {"total": [-5.0, 6.0] + [0.0] * 9}), "line 1 of .*total.0 -5.0"),
        (changed(0, scores=one_hot(10) | {"total": [0.5] * 11}), "line 1 of .*sum to 5.5"),
        (changed(2, id="u0"), "line 3 of .*'u0' .APA., which line 1 does: remove one"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(cli.InputError, match=message) as error:
        answers.read(tmp_path / "bad.jsonl")
    assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Floors


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def features(*parts):
    return floors.waveform_features(np.concatenate(parts))


def test_two_pauses_are_measured_but_no_short_gap_or_silence_around_speech():
    short = floors.SHORTEST_PAUSE - 2 * FRAME_LENGTH
    speech = tone(1), silence(short), tone(1), silence(0.6), tone(0.5), silence(1.2), tone(0.8)
    found = features(silence(1), *speech, silence(0.4))
    assert found["duration"] == pytest.approx(6.5 + short)
    assert found["speech_span"] == pytest.approx(5.1 + short, abs=2 * FRAME_LENGTH)
    assert found["silence_share"] == pytest.approx((3.2 + short) / (6.5 + short), abs=0.03)
    assert found["pauses"] == 2
    assert found["longest_pause"] == pytest.approx(1.2, abs=FRAME_LENGTH)
    assert found["pause_sum"] == pytest.approx(1.8, abs=2 * FRAME_LENGTH)


def test_pauses_do_not_depend_on_how_loud_the_recording_is_and_levels_are_decibels():
    parts = tone(1), silence(0.6), tone(0.5, amplitude=0.2), silence(1.2), tone(0.8)
    loud, quiet = features(*parts), features(*(0.05 * part for part in parts))
    assert [*loud.items()][:6] == [*quiet.items()][:6]
    assert loud["level_50"] - quiet["level_50"] == pytest.approx(-20 * np.log10(0.05), abs=0.01)
    assert features(tone(1))["level_50"] == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.1)


@pytest.mark.parametrize("audio", [tone(1)[: data.FRAME], np.zeros(RATE, np.float32), np.full(RATE, 1e-30, np.float32)])
def test_silent_and_very_short_audio_has_finite_features(audio):
    found = features(audio)
    assert np.isfinite(list(found.values())).all()
    assert (found["pauses"], found["silence_share"]) == (0, 0)


def test_the_fit_is_sklearns_linear_regression_kept_to_the_scale_of_the_scores(corpus):
    train, test = (data.read_corpus(corpus, split) for split in ("train", "test"))
    inputs, tested = ([[*features(read_audio(u.recording)).values()] for u in split] for split in (train, test))
    human = [[u.scores[name] for name in prompts.SCORES] for u in train]
    expected = LinearRegression().fit(inputs, human).predict(tested)
    fitted = floors.pauses_and_energy(train, test)
    assert [*fitted] == [u.id for u in test] and expected.max() > 10
    assert np.allclose([[scores[name] for name in prompts.SCORES] for scores in fitted.values()], expected.clip(0, 10))


@pytest.fixture(scope="module")
def copied(corpus, tmp_path_factory):
    """Predictions file of a system that gives everybody the same scores and writes the canonical phones."""
    lines = copying(data.read_corpus(corpus, "test", 12), dict.fromkeys(prompts.SCORES, 5))
    return write(tmp_path_factory.mktemp("predictions") / "predictions.jsonl", lines)


def test_the_floors_of_a_run_are_those_of_the_corpus_it_was_asked_about(monkeypatch, copied, corpus, tmp_path, capsys):
    shutil.copy(copied, tmp_path)
    (tmp_path / answers.SETTINGS).write_text(json.dumps({"evaluated": "base", "data": str(corpus)}))
    call(monkeypatch, floors, tmp_path / "predictions.jsonl")
    printed = capsys.readouterr().out.splitlines()
    wanted = ["this run, base", "canonical phones", "writes nothing", "pauses and energy"]
    assert [name for line in printed if (name := line[2:].split("  ")[0]) in wanted][:4] == wanted
    train, test = (data.read_corpus(corpus, split) for split in ("train", "test"))
    *_, fitted = floors.floor_rows(answers.read(copied), train, test[:12])
    (line,) = [line.split() for line in printed if line.startswith("  pauses and energy  ")]
    assert line[3:] == [*(f"{fitted.numbers[f'{name}_pcc']:.3f}" for name in prompts.SCORES), *["-"] * 5]


def test_flagging_everything_is_a_floor_of_detection():
    _, silent = floors.floor_rows(records(2), [], [])
    assert silent.numbers["per"] == 1 and silent.numbers["detection_recall"] == 1
    assert silent.numbers["detection_f1"] == pytest.approx(2 * 0.25 / 1.25)  # one phone of four is mispronounced


@pytest.mark.parametrize("change", [{"id": "unknown"}, {"reference": dict.fromkeys(prompts.SCORES, 0.5)}])
def test_predictions_of_another_corpus_are_refused(monkeypatch, copied, corpus, tmp_path, change):
    first, *rest = answers.read(copied)
    with pytest.raises(cli.InputError, match="is not in .*--data"):
        call(monkeypatch, floors, write(tmp_path / "p.jsonl", [first | change, *rest]), "--data", corpus)


# ----------------------------------------------------------------------------------------------------------------------
# Other audio


def test_silence_has_the_length_and_swapped_audio_another_speaker(corpus):
    utterances = data.read_corpus(corpus, "test")
    silent, swapped = (ablation.other_audio(utterances, how) for how in ("silence", "swap"))
    assert [len(read_audio(u.recording)) for u in silent] == [u.samples for u in utterances]
    assert not any(read_audio(u.recording).any() for u in silent)
    with pytest.raises(cli.InputError, match="two speakers: use more utterances, or silence"):
        ablation.other_audio(utterances[:3], "swap")
    by_bytes = {u.recording(): u.speaker for u in utterances}
    assert all(by_bytes[u.recording()] != u.speaker for u in swapped)
    assert [u.text for u in swapped] == [u.text for u in utterances]
