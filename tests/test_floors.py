import io
import json

import numpy as np
import pytest
import soundfile
from conftest import ROOT, script

import data
import prompts
from analysis import floors
from support import cli

RATE = data.SAMPLE_RATE
FRAME_LENGTH = data.FRAME / RATE  # seconds; a pause is known to within one frame


def tone(seconds, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * 220 * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def features(*parts):
    return dict(zip(floors.FEATURES, floors.waveform_features(np.concatenate(parts)), strict=True))


def utterance(id, audio, scores, speaker="s"):
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format="WAV", subtype="FLOAT")
    return data.Utterance(id, file.getvalue, len(audio), "", scores, (), speaker, 20, "f")


# ----------------------------------------------------------------------------------------------------------------------
# Features


def test_two_pauses_are_counted_and_measured():
    found = features(silence(0.3), tone(1), silence(0.6), tone(0.5), silence(1.2), tone(0.8), silence(0.4))
    assert found["duration"] == pytest.approx(4.8)
    assert found["speech_span"] == pytest.approx(4.1, abs=2 * FRAME_LENGTH)
    assert found["silence_share"] == pytest.approx(2.5 / 4.8, abs=0.03)
    assert found["pauses"] == 2
    assert found["longest_pause"] == pytest.approx(1.2, abs=FRAME_LENGTH)
    assert found["pause_sum"] == pytest.approx(1.8, abs=2 * FRAME_LENGTH)


def test_a_gap_shorter_than_the_shortest_pause_is_none_but_still_silent():
    short = floors.SHORTEST_PAUSE - 2 * FRAME_LENGTH
    found = features(tone(1), silence(short), tone(1))
    assert (found["pauses"], found["longest_pause"], found["pause_sum"]) == (0, 0, 0)
    assert found["silence_share"] == pytest.approx(short / (2 + short), abs=0.03)


def test_silence_before_and_after_speech_is_no_pause():
    assert features(silence(1), tone(1), silence(1))["pauses"] == 0


def test_pauses_do_not_depend_on_how_loud_the_recording_is():
    parts = tone(1), silence(0.6), tone(0.5, 0.2), silence(1.2), tone(0.8)
    loud, quiet = features(*parts), features(*(0.05 * part for part in parts))
    for name in floors.FEATURES[:6]:
        assert loud[name] == quiet[name]
    assert loud["level_50"] - quiet["level_50"] == pytest.approx(-20 * np.log10(0.05), abs=0.01)


def test_a_pause_is_quieter_than_speech_by_the_threshold_not_digitally_silent():
    def pauses(drop):
        return features(tone(1), tone(1, 0.5 * 10 ** (-drop / 20)), tone(1))["pauses"]

    assert pauses(floors.SILENCE + 1) == 1 and pauses(floors.SILENCE - 1) == 0


def test_the_level_of_a_tone_is_its_root_mean_square():
    levels = [value for name, value in features(tone(1)).items() if name.startswith("level")]
    assert levels == pytest.approx([20 * np.log10(0.5 / np.sqrt(2))] * 5, abs=0.1)


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros(data.FRAME, np.float32),
        tone(1)[: data.FRAME],
        tone(1)[: data.FRAME + data.HOP],
        np.zeros(RATE, np.float32),
        np.full(RATE, 0.25, np.float32),
        np.full(RATE, 1e-30, np.float32),
    ],
)
def test_silent_constant_and_very_short_audio_has_finite_features(audio):
    found = features(audio)
    assert np.isfinite(list(found.values())).all()
    assert (found["pauses"], found["silence_share"]) == (0, 0)
    assert found["speech_span"] <= found["duration"] == len(audio) / RATE


# ----------------------------------------------------------------------------------------------------------------------
# The fit


def spoken(seed):
    """A recording with some pauses between tones, all of random lengths and levels."""
    draw = np.random.default_rng(seed)
    parts = [tone(draw.uniform(0.3, 1), draw.uniform(0.1, 0.5))]
    for _ in range(draw.integers(0, 4)):
        parts += [silence(draw.uniform(0.1, 1)), tone(draw.uniform(0.3, 1), draw.uniform(0.1, 0.5))]
    return np.concatenate(parts)


def planted(audio):
    found = features(audio)
    return {
        "accuracy": 8 - found["pause_sum"],
        "fluency": 9 - 1.5 * found["pauses"],
        "prosodic": 2 + found["duration"] / 2,
        "total": 7 + found["level_50"] / 10 - found["silence_share"],
    }


def test_a_linear_relation_is_recovered_on_utterances_that_were_not_fitted():
    train = [utterance(f"a{i}", audio := spoken(i), planted(audio)) for i in range(40)]
    test = [utterance(f"b{i}", audio := spoken(100 + i), {}) for i in range(15)]
    fitted = floors.pauses_and_energy(train, test)
    assert list(fitted) == [u.id for u in test]
    for u in test:
        assert fitted[u.id] == pytest.approx(planted(data.read_audio(u.recording)), abs=1e-4)
        assert all(type(value) is float for value in fitted[u.id].values())


def test_the_human_scores_of_the_test_split_are_not_used():
    train = [utterance(f"a{i}", audio := spoken(i), planted(audio)) for i in range(20)]
    without, with_scores = (
        floors.pauses_and_energy(train, [utterance("b", spoken(50), scores)])
        for scores in ({}, dict.fromkeys(prompts.SCORES, 1))
    )
    assert without == with_scores


def test_scores_stay_on_their_scale():
    train = [utterance(f"a{i}", tone(i), dict.fromkeys(prompts.SCORES, i)) for i in range(1, 10)]
    fitted = floors.pauses_and_energy(train, [utterance("b", tone(25), {})])
    assert fitted == {"b": dict.fromkeys(prompts.SCORES, 10.0)}


def test_recordings_without_any_difference_get_the_mean_score():
    silent = [utterance(f"a{i}", silence(1), dict.fromkeys(prompts.SCORES, score)) for i, score in enumerate((4, 8))]
    fitted = floors.pauses_and_energy(silent, silent)
    for scores in fitted.values():
        assert scores == pytest.approx(dict.fromkeys(prompts.SCORES, 6.0))


def test_one_recording_is_held_at_a_time(monkeypatch):
    import weakref

    read, held = data.read_audio, []

    def counted(recording):
        audio = read(recording)
        held.append(weakref.ref(audio))
        assert sum(reference() is not None for reference in held) <= 2  # the one before goes when this one is assigned
        return audio

    monkeypatch.setattr(data, "read_audio", counted)
    utterances = [utterance(f"a{i}", spoken(i), dict.fromkeys(prompts.SCORES, 5)) for i in range(10)]
    floors.pauses_and_energy(utterances, utterances)
    assert len(held) == 20


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def predictions(corpus, tmp_path_factory):
    """Predictions file of a system that gives everybody the same scores and writes the canonical phones."""
    lines = []
    for u in data.read_corpus(corpus, "test")[:12]:
        answers = prompts.apa_target(dict.fromkeys(prompts.SCORES, 5)), prompts.mdd_target(u.text, u.canonical)
        for task, output in zip(prompts.TASKS, answers):
            lines.append(
                {"id": u.id, "task": task, "speaker": u.speaker, "output": output, "reference": data.reference(u, task)}
            )
    path = tmp_path_factory.mktemp("predictions") / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_prints_both_floors_beside_the_files_rows_and_loads_no_model(predictions, corpus, tmp_path):
    code = (
        f"import runpy, sys; sys.argv = ['floors', {str(predictions)!r}, '--data', {str(corpus)!r}];"
        f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_module('analysis.floors', run_name='__main__');"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    result = script("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = [line.split("  ")[0] for line in result.stdout.splitlines()]
    rows = [name for name in table if name in ("says everything right", "pauses and energy", "this run, predictions")]
    assert rows[:3] == ["says everything right", "pauses and energy", "this run, predictions"]
    train, test = (data.read_corpus(corpus, split) for split in ("train", "test"))
    records = [json.loads(line) for line in predictions.read_text().splitlines()]
    numbers = floors.floor_row(records, floors.pauses_and_energy(train, test[:12])).numbers
    (line,) = [line.split() for line in result.stdout.splitlines() if line.startswith("pauses and energy  ")]
    assert line[3:7] == [f"{numbers[f'{name}_pcc']:.3f}" for name in prompts.SCORES]
    assert not list(tmp_path.iterdir()) and len(list(predictions.parent.iterdir())) == 1


@pytest.mark.parametrize("change", [{"id": "unknown"}, {"reference": dict.fromkeys(prompts.SCORES, 0.5)}])
def test_predictions_of_another_corpus_are_refused(predictions, corpus, monkeypatch, tmp_path, change):
    first, rest = predictions.read_text().split("\n", 1)
    (tmp_path / "p.jsonl").write_text(json.dumps(json.loads(first) | change) + "\n" + rest)
    monkeypatch.setattr("sys.argv", ["floors", str(tmp_path / "p.jsonl"), "--data", str(corpus)])
    with pytest.raises(cli.InputError, match="is not in .*--data"):
        floors.main()
