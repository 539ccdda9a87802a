"""recipes/speech_detection.py: clips that give nothing away, one prompt, results beside a baseline."""

from collections import Counter
import json

from conftest import call, read_lines
import numpy as np
import pytest
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from recipes import common
from recipes import speech_detection as recipe
from support import cli
import tiny

CELL = len(recipe.CELLS)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A corpus with enough recordings of a second and more."""
    root = tmp_path_factory.mktemp("speech")
    tiny.write_corpus(root, {"train": 4, "test": 2}, per_speaker=30, seed=0)
    return root


def make(output, speech, **changes):
    sizes = {"train_clips": CELL, "test_clips": CELL}
    return recipe.make_clips(recipe.Settings(data=speech, output=output, **sizes | changes))


@pytest.fixture(scope="module")
def clips(speech, tmp_path_factory):
    """Clips and the folder they are in."""
    output = tmp_path_factory.mktemp("clips")
    return make(output, speech, train_clips=2 * CELL), output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    recipe.write_tiny(folder)
    return folder


@pytest.fixture
def model(base):
    return recipe.load_base(base, "all")


def waves(clips, count=6):
    clips, output = clips
    return [recipe.wave_of(clip, output) for clip in clips[:count]]


def test_classes_durations_snrs_and_kinds_are_equally_frequent(clips):
    for split, each in (("train", 2), ("test", 1)):
        cells = Counter((c.label, c.duration, c.snr) for c in clips[0] if c.split == split)
        assert len(cells) == CELL and set(cells.values()) == {each}
    kinds = Counter(clip.kind for clip in clips[0] if clip.label == "NONSPEECH")
    assert set(kinds) == {*recipe.DRAWN, "scrambled"} and max(kinds.values()) - min(kinds.values()) <= 2
    assert {*kinds} == {*recipe.Settings().kinds}


@pytest.mark.parametrize("what", ["source", "group", "sound"])
def test_a_leak_ends_the_run_and_names_the_clips(clips, what):
    train, test = clips[0][0], clips[0][-1]
    recipe.check_leaks(clips[0])
    leaking = [*clips[0][:-1], test.model_copy(update={what: getattr(train, what)})]
    with pytest.raises(cli.RunError, match=f"share a {what}, 1 times: .* and {test.id}"):
        recipe.check_leaks(leaking)


def test_noise_is_added_at_the_snr_asked_for():
    rng = np.random.default_rng(0)
    wave, noise = 0.01 * rng.standard_normal(16_000), rng.standard_normal(16_000)
    for snr in recipe.SNRS:
        added = recipe.add_noise(wave, noise, snr) - wave
        assert 20 * np.log10(wave.std() / added.std()) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize(
    "mlp, encoder, count, parts",
    [
        (True, False, 39_976_960, {"language_model"}),
        (False, True, 20_709_376, {"language_model", "audio_tower"}),
    ],
)
def test_lora_has_the_published_sizes_and_takes_the_audio_encoder_only_if_asked(mlp, encoder, count, parts):
    config = Qwen2AudioConfig(text_config={"model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032})
    with torch.device("meta"):
        network, targets = Qwen2AudioForConditionalGeneration(config), recipe.lora_targets(mlp, encoder)
        trained = common.trained(common.add_lora(network, recipe.Settings(), targets, task_type="CAUSAL_LM"))
    assert sum(weight.numel() for weight in trained.values()) == count
    assert {name.split(".")[3] for name in trained} == parts


def test_an_adapter_that_is_saved_and_loaded_gives_the_same_answers(base, clips, tmp_path):
    network, processor = recipe.load_base(base, "lora")
    network = common.add_lora(network, recipe.Settings(), recipe.lora_targets(False, False), task_type="CAUSAL_LM")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in common.trained(network).values():
            parameter.normal_(std=0.1)
    before = recipe.classify(network, processor, waves(clips), 2)
    common.save(network, tmp_path / "final")
    (tmp_path / "settings.json").write_text(json.dumps({"train": "lora", "model": str(base), "quantize": None}))
    again = recipe.classify(*recipe.load_trained(tmp_path), waves(clips), 2)
    assert again == before
    assert again != pytest.approx(recipe.classify(*recipe.load_base(base, "lora"), waves(clips), 2), abs=1e-3)


def test_loss_is_on_the_letter_and_the_end_token_alone(model, clips):
    network, processor = model
    answers, expected = ["A", "B", "A"], 0.0
    for wave, answer in zip(waves(clips, 3), answers):
        batch = recipe.read_clips(processor, [wave], [answer])
        *_, letter, end = batch["input_ids"][0]
        assert processor.tokenizer.decode([letter, end]) == answer + recipe.END
        said = network(**batch).logits[0].log_softmax(-1)
        expected -= (said[-3, letter] + said[-2, end]).item()
    loss = recipe.answer_loss(network, processor, waves(clips, 3), answers)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_prompt_is_the_same_in_training_and_in_evaluation(model, clips):
    _, processor = model
    asked = recipe.read_clips(processor, waves(clips, 1))
    taught = recipe.read_clips(processor, waves(clips, 1), ["B"])
    assert taught["input_ids"][0, :-2].tolist() == asked["input_ids"][0].tolist()
    text = processor.tokenizer.decode(asked["input_ids"][0])
    assert recipe.SYSTEM in text and recipe.QUESTION in text and "helpful assistant" not in text


def test_forward_logits_under_the_same_prompt_agree_with_constrained_generation(model, clips):
    network, processor = model
    ids = recipe.letter_ids(processor.tokenizer)
    assert all(len(tokens) == 2 for tokens in ids.values())  # of each way of writing it: plain, and after a space
    kept = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kept["prefix_allowed_tokens_fn"] = lambda row, written: sum(ids.values(), [])
    for wave, forward in zip(waves(clips), recipe.classify(network, processor, waves(clips), 3), strict=True):
        logits = network.generate(**recipe.read_clips(processor, [wave]), **kept).logits[0][0]
        sums = {label: logits[tokens].exp().sum() for label, tokens in ids.items()}
        assert forward == pytest.approx(float(sums["SPEECH"] / sum(sums.values())), abs=1e-5)


def test_an_answer_does_not_depend_on_the_clips_beside_it(model, clips):
    network, processor = model
    mixed = [recipe.wave_of(clip, clips[1]) for clip in clips[0][:12]]
    assert len({len(wave) for wave in mixed}) == len(recipe.DURATIONS)
    alone = recipe.classify(network, processor, mixed, 1)
    assert recipe.classify(network, processor, mixed, 12) == pytest.approx(alone, abs=1e-5)
    processor.tokenizer.padding_side = "right"
    assert recipe.classify(network, processor, mixed, 12) != pytest.approx(alone, abs=1e-5)


def test_one_threshold_on_flatness_solves_the_task_as_it_was_published(speech, tmp_path):
    clips = make(tmp_path, speech, kinds=("white",), train_clips=2 * CELL)
    train, test = ([clip for clip in clips if clip.split == split] for split in recipe.SPLITS)
    answers = recipe.flatness_baseline(train, test, tmp_path)
    assert np.mean([answer == (clip.label == "SPEECH") for answer, clip in zip(answers, test, strict=True)]) > 0.9


def test_an_update_does_not_depend_on_how_its_clips_are_batched(base, clips, tmp_path):
    logs, fixed = [], {"epochs": 1, "warmup": 0.0, "learning_rate": 1e-3, "output": clips[1]}
    for batch_size, accumulation in ((8, 1), (2, 4)):
        given = recipe.Settings(batch_size=batch_size, accumulation=accumulation, **fixed)
        recipe.train(*recipe.load_base(base, "all"), clips[0][:16], given, 0, tmp_path)
        logs.append(read_lines(tmp_path / "log.jsonl"))
    rates = [common.learning_rate(step, 2, peak=1e-3, warmup=0) for step in range(2)]
    assert [line["learning_rate"] for line in logs[0]] == rates and rates[1] < rates[0]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_run_keeps_what_it_answered_and_its_model_answers_and_is_compared(speech, tmp_path, monkeypatch, capsys):
    def say(*arguments):
        call(monkeypatch, recipe, *arguments)
        return capsys.readouterr().out

    output, sizes = tmp_path / "out", ["--train-clips", CELL, "--test-clips", CELL]
    how = ["--model", "tiny", "--train", "all", "--learning-rate", 1e-3, "--epochs", 2, "--seeds", 0, 1]
    say("--data", speech, *how, *sizes, "--output", output)
    results = json.loads((output / "results.json").read_text())
    for seed in (0, 1):
        lines, steps = (read_lines(output / f"seed-{seed}" / f"{name}.jsonl") for name in ("predictions", "log"))
        right = np.mean([(line["speech"] > 0.5) == (line["label"] == "SPEECH") for line in lines])
        assert len(lines) == CELL and results[f"model, seed {seed}"]["accuracy"] == right
        assert [step["step"] for step in steps] == [1, 2] and steps[1]["loss"] < steps[0]["loss"]
    clip, runs = lines[0], [output / "seed-1"] * 2
    wave = output / "clips" / "test" / f"{clip['id']}.wav"
    name = "SPEECH" if clip["speech"] > 0.5 else "NONSPEECH"
    answered = [name, f"{max(clip['speech'], 1 - clip['speech']):.3f}"]
    assert say("--trained", runs[0], "--audio", wave).split()[-2:] == answered
    assert "A - B +0.000, 95 % +0.000 to +0.000, p = 1" in say("--compare", *runs)
    common.write_lines(output / "predictions.jsonl", [lines[0] | {"sound": "x"}, *lines[1:]])
    with pytest.raises(cli.InputError, match="were tested on other clips"):
        say("--compare", runs[0], output)
