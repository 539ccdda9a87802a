import copy
import re

from conftest import call
import numpy as np
import pytest
import torch
from transformers import Phi4MultimodalFeatureExtractor

import model as models
import prompts
from support import cli
import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.new_tokenizer()


@pytest.mark.parametrize("task", prompts.TASKS)
def test_both_prompts_round_trip_through_the_tokenizer(tokenizer, task):
    text = prompts.build_prompt(task, control_token=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 60  # an ordinary tokenizer makes over 500 of APA's


def test_words_phones_and_the_numbers_0_to_10_are_one_token_each(tokenizer):
    for text in (*tiny.LEXICON, *tiny.PHONES, *map(str, range(11))):
        assert len(tokenizer.encode(f" {text}")) == 1, text


def test_the_ids_of_the_prompts_lines_depend_on_no_order_of_a_set(tokenizer):
    lines = [str(token) for token in tokenizer.added_tokens_decoder.values()][len(tiny.SPECIAL_TOKENS) :]
    assert len(lines) > 20 and lines == sorted(lines, key=lambda line: (-len(line), line))


def test_the_labels_of_a_clip_are_where_its_phones_sound():
    rng = np.random.default_rng(0)
    sounds = [tiny.Sound(None, 0.1), tiny.Sound("AA", 0.1), tiny.Sound("B", 0.05, breath=0.5)]
    wave, labels = tiny.synthesise(sounds, tiny.new_voice(rng), rng)
    phones, breathy = labels.T
    assert len(wave) == len(labels) == 4000
    assert phones.tolist() == [-1] * 1600 + [tiny.PHONES.index("AA")] * 1600 + [tiny.PHONES.index("B")] * 800
    assert breathy.tolist() == [0] * 3200 + [1] * 800
    assert np.abs(wave[:1600]).max() < 0.01 < np.abs(wave[1700:3100]).mean()


def test_scores_follow_from_what_was_done_to_the_audio():
    rng = np.random.default_rng(0)
    voices = (tiny.Voice(pitch=150, tract=1.0, rate=1.0, skill=skill) for skill in (1.0, 0.0))
    good, bad = ([tiny.learner_speech(rng, voice) for _ in range(60)] for voice in voices)
    for record, wave in good + bad:
        labels = [len(word["mispronunciations"]) for word in record["words"]]
        phones = sum(len(word["phones"]) for word in record["words"])
        assert record["accuracy"] == tiny._score(10 - 16 * sum(labels) / phones)
        assert np.isfinite(wave).all() and np.abs(wave).max() < 1
    for name in prompts.SCORES:
        assert np.mean([r[name] for r, _ in good]) > np.mean([r[name] for r, _ in bad]) + 2
    seconds = {name: np.mean([len(wave) for _, wave in speech]) for name, speech in (("good", good), ("bad", bad))}
    assert seconds["bad"] > seconds["good"]  # pauses


def test_the_same_seed_writes_the_same_corpus_and_another_seed_another(corpus, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        tiny.write_corpus(tmp_path / name, {"train": 4, "test": 2}, per_speaker=10, seed=seed)
    scores = "resource/scores.json"
    assert (tmp_path / "same" / scores).read_text() == (corpus / scores).read_text()
    assert (tmp_path / "other" / scores).read_text() != (corpus / scores).read_text()
    recordings = sorted(corpus.glob("WAVE/*/*.WAV"))
    assert len(recordings) == 60
    for file in recordings:
        assert (tmp_path / "same" / file.relative_to(corpus)).read_bytes() == file.read_bytes()


def test_pretraining_changes_the_encoder_first_and_then_keeps_what_was_heard(tokenizer):
    torch.manual_seed(0)
    model = models.SpeechModel(tiny.new_network(tokenizer), tokenizer, Phi4MultimodalFeatureExtractor())
    initial = copy.deepcopy(model.core.state_dict())
    pretraining = tiny.Pretraining(model, seed=0, clips=8)
    pretraining.run(steps=5)
    for clip in pretraining.clips:
        assert torch.allclose(
            models.encode_audio(model.audio, [clip.features])[0], clip.audio, atol=1e-5
        )  # was heard in a batch
    changed = {name for name, weight in model.core.state_dict().items() if not torch.equal(weight, initial[name])}
    assert any("audio_embed.encoder" in name for name in changed) and "model.layers.2.mlp.down_proj.weight" in changed


def test_base_and_speech_adapter_together_compute_what_was_pretrained(tokenizer):
    torch.manual_seed(0)
    network = tiny.new_network(tokenizer).eval()
    names = [name for name, _ in network.named_modules() if re.fullmatch(models.LORA_TARGETS, name)]
    initial = {name: network.get_submodule(name).weight.detach().clone() for name in names}
    with torch.no_grad():
        for name in names:  # a change of full rank, as pretraining makes it
            weight = network.get_submodule(name).weight
            weight += 0.02 * torch.randn_like(weight)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        pretrained = copy.deepcopy(network)(ids).logits
        split = tiny.split_off_adapter(network, initial).eval()
        assert torch.allclose(split(ids).logits, pretrained, atol=1e-4)
        with split.disable_adapter():
            assert not torch.allclose(split(ids).logits, pretrained, atol=1e-2)


def test_what_is_there_already_is_not_replaced(monkeypatch, tmp_path):
    (tmp_path / "there" / "corpus").mkdir(parents=True)
    with pytest.raises(cli.InputError, match="there/corpus exists already"):
        call(monkeypatch, tiny, "--output", "there")
    assert len([*tmp_path.rglob("*")]) == 2
