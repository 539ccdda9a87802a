"""recipes/gold_transcripts.py: what could silently be wrong. Real transformers classes, tiny and random."""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import ROOT, script
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Wav2Vec2Config, Wav2Vec2ForCTC

import data
from support import cli

sys.path.append(str(ROOT / "recipes"))

import gold_transcripts as recipe

SCRIPT = ROOT / "recipes" / "gold_transcripts.py"
SCHOOL, CAT = "HE WENT TOO SKOOL WITH HIS BROTHER", "A KAT"  # of different lengths: one of them is padded
ANSWERS = {SCHOOL: 'Corrected sentence: "He went to school with his brother."', CAT: "A cat."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "recogniser"
    recipe.write_tiny(path, seed=0)
    return path


@pytest.fixture
def recogniser(folder):
    return recipe.Recogniser(str(folder), time_mask=0.0)


def sound(seconds, seed=0):
    """Noise that swells and fades, (S,)."""
    noise = np.random.default_rng(seed).normal(size=int(seconds * data.SAMPLE_RATE))
    return (0.1 * noise * np.sin(np.linspace(0, 20, len(noise)))).astype(np.float32)


def sample(id, seconds=1.0, human="A CAT", condition="all", speaker=None, seed=0):
    return recipe.Sample(id, condition, speaker or id, lambda: sound(seconds, seed), human)


def settings(*arguments):
    """The settings of a command line."""
    before, sys.argv = sys.argv, ["gold_transcripts.py", *map(str, arguments)]
    try:
        return recipe.parse_settings()
    finally:
        sys.argv = before


def frames_of(ids, symbols=32):
    """Logits (F, V) whose likeliest symbols are these."""
    return F.one_hot(torch.tensor(ids), symbols).float()


# ----------------------------------------------------------------------------------------------------------------------
# The alphabet


def test_a_transcript_joins_runs_keeps_letters_that_a_blank_parts_and_shows_no_special_symbol(recogniser):
    ids = [
        recipe.SYMBOLS.index(s) for s in ["<s>", "H", "H", "E", "<pad>", "L", "<pad>", "L", "O", "|", "|", "A", "<unk>"]
    ]
    assert recogniser.decode(frames_of(ids)) == "HELLO A"
    plain = [id for id in ids if recipe.SYMBOLS[id] not in ("<s>", "<unk>")]
    assert recogniser.processor.tokenizer.decode(plain) == "HELLO A"  # the library's own, without special symbols
    assert recogniser.decode(frames_of([0, 0])) == ""


@pytest.mark.parametrize(
    "text, kept, lost",
    [
        ("He's here, isn't he?", "HE'S HERE ISN'T HE", {}),
        ("don’t — “stop”", "DON'T STOP", {}),
        ("Room 12, déjà vu", "ROOM DJ VU", {"1": 1, "2": 1, "É": 1, "À": 1}),
        ("...", "", {}),
    ],
)
def test_text_is_brought_into_the_alphabet_and_what_is_lost_is_counted(recogniser, text, kept, lost):
    assert recogniser.normalise(text) == (kept, Counter(lost))


def test_a_vocabulary_of_small_letters_gets_small_letters(recogniser):
    recogniser.letters = {symbol.lower(): id for symbol, id in recogniser.letters.items()}
    recogniser.capitals = False
    assert recogniser.normalise("It's ME") == ("it's me", Counter())


def test_targets_are_those_of_the_real_tokenizer(recogniser):
    for text in ("A", "IT'S A QUIZ", "HELLO WORLD"):
        ids = recogniser.encode(recogniser.normalise(text.lower())[0])
        assert ids == recogniser.processor.tokenizer(text).input_ids
        assert recogniser.processor.tokenizer.unk_token_id not in ids


# ----------------------------------------------------------------------------------------------------------------------
# The recogniser


@torch.no_grad()
def test_padding_would_change_the_logits_of_a_clip_so_each_goes_alone(recogniser):
    short, long = sound(0.8), sound(2.0, seed=1)
    alone = recogniser.logits(short)
    batch = recogniser.processor(audio=[short, long], sampling_rate=16000, return_tensors="pt", padding=True)
    padded = recogniser.network(batch.input_values).logits[0, : len(alone)]
    assert (padded - alone).abs().max() > 1e-3  # why
    samples = [sample("short", 0.8), sample("long", 2.0, seed=1)]
    together = recogniser.transcribe(samples, "")
    assert together == [recogniser.transcribe([one], "")[0] for one in samples]


def test_the_number_of_frames_is_that_of_the_logits(recogniser):
    for seconds in (0.1, 0.33, 1.0):
        audio = sound(seconds)
        assert recogniser.frames(len(audio)) == len(recogniser.logits(audio))


@pytest.mark.parametrize("band", [0, 10, 31])
def test_each_band_of_the_tiny_feature_encoder_hears_its_own_tone(recogniser, band):
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(11), 34) / 2595) - 1)
    tone = torch.sin(2 * torch.pi * edges[band + 1] * torch.arange(16000) / 16000)
    layer = recogniser.network.wav2vec2.feature_extractor.conv_layers
    with torch.no_grad():
        rectified = F.relu(layer[0].conv(tone[None, None].float()))
        loud = layer[1].conv(rectified).mean(dim=-1)[0]
    assert loud.argmax() == band


def test_a_checkpoint_without_a_mask_embedding_trains_with_time_masks_on_finite_numbers(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    assert weights.pop("wav2vec2.masked_spec_embed") is not None
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    recogniser = recipe.Recogniser(str(tmp_path / "lacking"), time_mask=0.5)
    named = recipe.prepare_training(recogniser, settings("--data", "x", "--oracle", "--no-lora"))
    optimiser = torch.optim.AdamW(named.values(), lr=0.0)
    batch = [(sample("a"), recogniser.encode("A CAT"))]
    first, second = (recipe.train_step(recogniser, named, optimiser, batch, 1, 1.0) for _ in range(2))
    assert all(np.isfinite([n["loss"], n["gradient_norm"]]).all() for n in (first, second))
    assert first["loss"] != second["loss"]  # other frames were hidden


def test_a_loss_that_is_not_finite_names_the_sample_and_changes_no_weight(recogniser):
    named = recipe.prepare_training(recogniser, settings("--data", "x", "--oracle", "--no-lora"))
    before = {name: weight.detach().clone() for name, weight in named.items()}
    bad = recipe.Sample("bad", "all", "s", lambda: np.full(16000, np.nan, dtype=np.float32), None)
    batch = [(sample("good"), recogniser.encode("A")), (bad, recogniser.encode("A"))]
    with pytest.raises(cli.RunError, match="one of: bad;"):
        recipe.train_step(recogniser, named, torch.optim.AdamW(named.values()), batch, 1, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in named.items())


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"rubbish"), "cannot be loaded"),
        (lambda f: (f / "vocab.json").unlink(), "cannot be loaded"),
        (
            lambda f: save_file(
                {k: v for k, v in load_file(f / "model.safetensors").items() if "lm_head" not in k},
                f / "model.safetensors",
                metadata={"format": "pt"},
            ),
            "lacks 2 weights, such as lm_head.bias",
        ),
    ],
)
def test_a_recogniser_that_cannot_be_used_is_an_error_that_names_it(folder, tmp_path, broken, message):
    shutil.copytree(folder, tmp_path / "broken")
    broken(tmp_path / "broken")
    with pytest.raises(cli.InputError, match=message) as error:
        recipe.Recogniser(str(tmp_path / "broken"), 0.0)
    assert "broken" in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# CTC


def paths_to(target, frames, symbols, blank=0):
    """All sequences of `frames` symbols that are this target once runs are joined and blanks removed."""
    for path in itertools.product(range(symbols), repeat=frames):
        if [symbol for symbol, _ in itertools.groupby(path) if symbol != blank] == list(target):
            yield path


@pytest.mark.parametrize("target", [[1], [1, 2], [1, 1], [2, 1, 2]])
def test_the_loss_is_the_probability_of_all_alignments(target):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probabilities = logits.softmax(dim=-1)
    total = sum(np.prod([probabilities[t, s].item() for t, s in enumerate(path)]) for path in paths_to(target, 4, 3))
    assert recipe.ctc_loss(logits, target, 0).item() == pytest.approx(-np.log(total))


def test_the_loss_is_the_librarys_own_for_labels_padded_with_ignored_ones(recogniser):
    targets, audio = [recogniser.encode(text) for text in ("HELLO", "A")], sound(1.0)
    labels = torch.full((2, 5), -100)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = torch.tensor(target)
    network = recogniser.network
    network.config.ctc_loss_reduction = "sum"
    values = recogniser.processor(audio=[audio, audio], sampling_rate=16000, return_tensors="pt").input_values
    theirs = network(values, labels=labels).loss
    ours = sum(recipe.ctc_loss(recogniser.logits(audio), target, recogniser.blank) for target in targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_gradient_of_a_step_is_the_mean_over_its_characters_whoever_shares_it(recogniser):
    named = recipe.prepare_training(recogniser, settings("--data", "x", "--oracle", "--no-lora"))
    batch = [
        (sample("short", 0.6), recogniser.encode("A")),
        (sample("long", 1.5, seed=1), recogniser.encode("HELLO CAT")),
    ]

    def gradient(samples):
        gradients = {}
        keep = argparse.Namespace(
            step=lambda: gradients.update({n: w.grad.clone() for n, w in named.items() if w.grad is not None}),
            zero_grad=lambda: recogniser.network.zero_grad(),
        )
        recipe.train_step(recogniser, named, keep, samples, 1, clip=1e9)
        return gradients

    together, reverse, short, long = map(gradient, (batch, batch[::-1], batch[:1], batch[1:]))
    assert any(value.norm() > 0 for value in together.values())
    for name, value in together.items():
        expected = (1 * short[name] + 9 * long[name]) / 10
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, reverse[name], rtol=1e-4, atol=1e-5)


def test_what_ctc_cannot_align_is_left_out_by_name_and_nothing_else(recogniser):
    samples, lines = [], []
    for i, (text, seconds) in enumerate(itertools.product(("AB", "AA", "ABBA", "HELLO"), np.arange(0.06, 0.4, 0.04))):
        samples.append(sample(str(i), seconds))
        lines.append({"id": str(i), "baseline": "", "gold": text})
    recogniser.network.config.mask_time_length = 1
    chosen, too_short = recipe.choose_training(lines, samples, recogniser)
    assert len(chosen) + len(too_short) == len(lines) and chosen and too_short
    for one, target in chosen:
        assert torch.isfinite(recipe.ctc_loss(recogniser.logits(one.audio()), target, 0))
    for line, one in zip(lines, samples):
        if line["id"] in too_short:
            assert torch.isinf(recipe.ctc_loss(recogniser.logits(one.audio()), recogniser.encode(line["gold"]), 0))


def test_a_clip_shorter_than_a_time_mask_is_left_out(recogniser):
    recogniser.network.config.update({"mask_time_prob": 0.05, "mask_time_length": 100})
    line = {"id": "a", "baseline": "", "gold": "A"}
    assert recipe.choose_training([line], [sample("a")], recogniser) == ([], ["a"])


def test_only_samples_whose_transcript_is_not_their_gold_are_trained_on(recogniser):
    lines = [{"id": id, "baseline": "A CAT", "gold": gold} for id, gold in zip("abc", ("A CAT", "A BAT", None))]
    chosen, too_short = recipe.choose_training(lines, [sample(id) for id in "abc"], recogniser)
    assert [(one.id, target) for one, target in chosen] == [("b", recogniser.encode("A BAT"))] and not too_short


# ----------------------------------------------------------------------------------------------------------------------
# Gold


class FakeLlm:
    """Answers from a table, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def rewrite(self, transcripts):
        self.asked += transcripts
        return [self.answers[transcript] for transcript in transcripts]


def test_gold_is_rejected_with_its_reason_and_an_empty_transcript_is_never_sent(recogniser, tmp_path):
    answers = {
        "A KAT": "A cat.",
        "ONE TWO THREE FOUR": "One two three five!",
        "HE WENT": "Once upon a day he went on",
        "LONG": None,
        "NOTHING": '\n""',
        "SAME": "Same",
        "ROOM": "Room 12",
    }
    transcripts = [*answers, ""]
    llm, given = FakeLlm(answers), settings("--audio-dir", "x", "--output", tmp_path, "--llm-batch", 3)
    samples = [sample(str(i), human=None) for i in range(len(transcripts))]
    lines, lost = recipe.write_gold(samples, transcripts, recogniser, llm, given)
    assert sorted(llm.asked) == sorted(answers)
    assert [line["verdict"] for line in lines] == [
        "kept",
        "kept",
        "too far from the transcript",
        "answer did not end",
        "empty answer",
        "kept",
        "characters outside the alphabet",
        "empty transcript",
    ]
    assert [line["gold"] for line in lines] == ["A CAT", "ONE TWO THREE FIVE", None, None, None, "SAME", None, None]
    assert [line["distance"] for line in lines[:3]] == [0.5, 0.25, 2.5]
    assert lost == {"1": 1, "2": 1}
    assert [json.loads(line) for line in (tmp_path / "gold.jsonl").read_text().splitlines()] == lines


def test_the_limit_of_the_distance_is_the_setting(recogniser, tmp_path):
    for limit, kept in ((0.4, False), (0.5, True)):
        given = settings("--audio-dir", "x", "--output", tmp_path, "--max-distance", limit)
        lines, _ = recipe.write_gold([sample("a")], ["A KAT"], recogniser, FakeLlm({"A KAT": "A cat"}), given)
        assert (lines[0]["gold"] is not None) is kept


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("He went home.", "He went home."),
        ('"He went home."', "He went home."),
        ("Corrected sentence: “He went home.”", "He went home."),
        ("Sure! Here is the corrected transcript:\nHe went home.\nI changed one word.", "He went home."),
        ("**He went home.**", "He went home."),
        ("\n  Output: He went home", "He went home"),
        ("The answer is no", "The answer is no"),
        ("Text me later", "Text me later"),
        ("", ""),
    ],
)
def test_an_answer_is_its_first_sentence_without_label_and_quotes(answer, sentence):
    assert recipe.clean_answer(answer) == sentence


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A tiny Mistral with a chat template that has memorised ANSWERS, as a checkpoint folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer.train_from_iterator(
        [recipe.PROMPT, *ANSWERS, *ANSWERS.values()] * 3,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "<s>{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    torch.manual_seed(0)
    network = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            max_position_embeddings=512,
            sliding_window=None,
        )
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    rows = []
    for transcript, answer in ANSWERS.items():
        chat = [{"role": "user", "content": recipe.PROMPT.format(transcript=transcript)}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False)
        rows.append([tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer + "</s>")])
    loss = 1.0
    while loss > 0.02:
        optimiser.zero_grad()
        losses = [
            network(torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])).loss
            for prompt, answer in rows
        ]
        loss = sum(losses)
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("llm")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_llm_answers_a_padded_row_as_it_answers_it_alone_and_only_new_text_comes_back(llm_folder):
    llm, masks = recipe.Llm(str(llm_folder), None, 64), []
    generate = llm.network.generate
    llm.network.generate = lambda **inputs: masks.append(inputs["attention_mask"]) or generate(**inputs)
    assert llm.rewrite([SCHOOL, CAT]) == list(ANSWERS.values())
    assert masks[0][:, -1].all() and not masks[0][1, 0]  # padded on the left: the answer continues the prompt
    assert llm.rewrite([CAT]) == [ANSWERS[CAT]]
    assert [recipe.clean_answer(answer) for answer in ANSWERS.values()] == [
        "He went to school with his brother.",
        "A cat.",
    ]


def test_an_answer_that_does_not_end_is_none(llm_folder):
    assert recipe.Llm(str(llm_folder), None, 3).rewrite([SCHOOL]) == [None]


def test_an_llm_in_4_bits_is_in_4_bits_and_answers(llm_folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    llm = recipe.Llm(str(llm_folder), "nf4", 16)
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in llm.network.modules())


def test_check_llm_shows_and_times_a_correction(llm_folder, capsys):
    recipe.check_llm(settings("--check-llm", "--llm", llm_folder))
    printed = capsys.readouterr().out
    assert recipe.EXAMPLE in printed and re.search(r"loaded in [\d.]+ s, corrected in [\d.]+ s", printed)


def test_an_llm_without_a_chat_template_is_an_error(llm_folder, tmp_path):
    shutil.copytree(llm_folder, tmp_path / "base")
    for file in tmp_path.glob("base/*"):
        if file.name == "chat_template.jinja":
            file.unlink()
    with pytest.raises(cli.InputError, match="has no chat template"):
        recipe.Llm(str(tmp_path / "base"), None, 3)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


def test_lora_on_the_real_size_trains_the_published_number_of_weights():
    with torch.device("meta"):
        network = Wav2Vec2ForCTC(Wav2Vec2Config())
        plain = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=recipe.ATTENTION))
        assert plain.get_nb_trainable_parameters()[0] == 589_824
        network = Wav2Vec2ForCTC(Wav2Vec2Config())
        holder = argparse.Namespace(network=network)
        weights = recipe.prepare_training(holder, settings("--data", "x", "--oracle"))
    assert sum(weight.numel() for weight in weights.values()) == 614_432


def trained(recogniser, tmp_path, *arguments):
    """Some steps on two samples. Returns the logits of a clip before and after, and where it was saved."""
    audio = sound(1.0, seed=5)
    given = settings(
        "--data", "x", "--oracle", "--output", tmp_path, "--learning-rate", 1e-2, "--epochs", 3, *arguments
    )
    with torch.no_grad():
        before = recogniser.logits(audio)
    chosen = [(sample(id, seed=i), recogniser.encode("A CAT")) for i, id in enumerate("ab")]
    summary = recipe.train(recogniser, chosen, given)
    recogniser.network.eval()
    with torch.no_grad():
        return audio, before, recogniser.logits(audio), summary


def test_an_adapter_reloaded_and_merged_computes_what_was_trained_head_included(folder, recogniser, tmp_path):
    audio, before, after, summary = trained(recogniser, tmp_path)
    assert (after - before).abs().max() > 0.1
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    base = recipe.Recogniser(str(folder), 0.0)
    base.network = PeftModel.from_pretrained(base.network, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(base.logits(audio), after, rtol=0, atol=0)
        base.network = base.network.merge_and_unload()
        torch.testing.assert_close(base.logits(audio), after, rtol=1e-4, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == summary["steps"] == 3


def test_a_fresh_adapter_changes_nothing_and_trains_attention_and_head_alone(folder, recogniser):
    audio = sound(1.0)
    with torch.no_grad():
        before = recogniser.logits(audio)
    weights = recipe.prepare_training(recogniser, settings("--data", "x", "--oracle"))
    with torch.no_grad():
        assert torch.equal(recogniser.logits(audio), before)
    assert len(weights) == 2 * 4 * 2 + 2  # A and B of four projections in two layers; weight and bias of the head
    assert all("lora_" in name and ".attention." in name or "lm_head" in name for name in weights)


def test_full_training_leaves_the_feature_encoder_and_reloads_as_a_recogniser(folder, recogniser, tmp_path):
    audio, before, after, _ = trained(recogniser, tmp_path, "--no-lora")
    reloaded = recipe.Recogniser(str(tmp_path / "model"), 0.0)
    with torch.no_grad():
        torch.testing.assert_close(reloaded.logits(audio), after, rtol=0, atol=0)
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "model"))
    assert old.keys() - new.keys() == {"wav2vec2.masked_spec_embed"}  # which --time-mask 0 does without
    same = {name for name in new if torch.equal(old[name], new[name])}
    assert {name for name in old if "feature_extractor" in name} <= same
    assert not same & {name for name in old if "lm_head" in name or "encoder.layers" in name and "k_proj.b" not in name}


# ----------------------------------------------------------------------------------------------------------------------
# Recordings and numbers


@pytest.fixture
def recordings(tmp_path):
    for i in range(5):
        for name in ("clean", "noisy"):
            path = tmp_path / "recordings" / name / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sound(2.5, seed=i), 16000)
    return tmp_path / "recordings"


def test_a_clean_recording_and_its_noisy_copy_are_held_out_together(recordings):
    samples = recipe.read_samples(settings("--audio-dir", recordings))
    training, held_out = data.hold_out_speakers(samples, 0.4, seed=0)
    assert Counter(one.condition for one in samples) == {"clean": 5, "noisy": 5}
    assert Counter(one.condition for one in held_out) == {"clean": 2, "noisy": 2}
    groups = [{one.speaker for one in samples if one.condition == name} for name in ("clean", "noisy")]
    assert groups[0] == groups[1] and not {one.speaker for one in training} & {one.speaker for one in held_out}
    assert len(recipe.read_samples(settings("--audio-dir", recordings, "--limit", 2))) == 4
    assert {one.condition for one in recipe.read_samples(settings("--audio-dir", recordings / "clean"))} == {"all"}


def test_every_recording_that_cannot_be_used_is_named(recordings):
    (recordings / "clean" / "0.wav").write_bytes(b"rubbish")
    (recordings / "noisy" / "3.wav").write_bytes(b"")
    soundfile.write(recordings / "noisy" / "4.wav", sound(1.0, seed=4), 8000)
    with pytest.raises(cli.InputError, match="3 of 10 recordings") as error:
        recipe.read_samples(settings("--audio-dir", recordings))
    assert "clean/0.wav" in str(error.value) and "noisy/3.wav" in str(error.value)
    assert "noisy/4.wav: 8,000 Hz is below 16,000 Hz" in str(error.value)


def line(speaker, human, baseline, tuned, gold=None, condition="all"):
    return {
        "speaker": speaker,
        "human": human,
        "baseline": baseline,
        "tuned": tuned,
        "gold": gold,
        "condition": condition,
    }


def test_error_rates_are_pooled_and_a_line_without_reference_is_left_out():
    lines = [line("a", "ONE TWO THREE", "ONE", "ONE TWO THREE"), line("b", "A", "B C", ""), line("b", None, "X", "Y")]
    numbers = recipe.compare(lines, "human", "baseline", "tuned")
    assert numbers["samples"] == numbers["speakers"] == 2
    assert numbers["baseline"]["wer"] == 4 / 4 and numbers["tuned"]["wer"] == 1 / 4
    assert numbers["baseline"]["cer"] == (10 + 3) / 14 and numbers["tuned"]["cer"] == 1 / 14  # spaces count
    assert (numbers["tuned"]["error_samples"], numbers["tuned"]["empty"]) == (1, 1)
    assert numbers["difference"]["wer"] == -0.75 == numbers["difference"]["wer_relative"]
    assert recipe.compare(lines[2:], "human", "baseline", "tuned") is None


def test_the_interval_of_a_difference_is_over_speakers_and_pairs_the_systems():
    better = [
        line(str(i), "A B C D", "A B X X" if i % 2 else "X X X X", "A B C X" if i % 2 else "A X X X") for i in range(20)
    ]
    numbers = recipe.compare(better, "human", "baseline", "tuned")
    assert numbers["difference"]["wer_interval"] == pytest.approx((-0.25, -0.25))  # every speaker gains the same
    low, high = numbers["baseline"]["wer_interval"]
    assert low < 0.75 < high


def test_gold_is_measured_against_human_text_and_conditions_are_reported_apart():
    lines = [
        line("a", "A B", "A X", "A B", "A B", "clean"),
        line("b", "C D", "X X", "C X", "C X", "noisy"),
        line("c", "E F", "E", "E", None, "noisy"),
    ]
    results = recipe.evaluate(lines, lines, settings("--audio-dir", "x"))
    assert set(results["held_out"]) == {"all", "clean", "noisy"}
    assert (
        results["held_out"]["noisy"]["gold"]["samples"] == 1 and results["held_out"]["noisy"]["human"]["samples"] == 2
    )
    assert results["held_out"]["all"]["gold"]["tuned"]["wer"] == 0.0  # the same wrong word as the gold
    assert results["gold_quality"]["held_out"]["gold"]["wer"] == 1 / 4
    assert results["gold_quality"]["held_out"]["baseline"]["wer"] == 3 / 4


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --audio-dir.*or --data"),
        (["--audio-dir", "x", "--data", "y"], "one of the two"),
        (["--audio-dir", "x", "--oracle"], "--audio-dir has none"),
        (["--data", "x", "--oracle", "--llm", "y"], "asks no LLM: leave out --llm"),
        (["--data", "x", "--no-lora", "--rank", "4"], "trains no LoRA: leave out --rank"),
        (["--audio-dir", "x", "--split", "test"], "leave it out"),
        (["--check-llm", "--epochs", "2"], "leave out --epochs"),
        (["--write-tiny", "x", "--data", "y"], "leave out --data"),
        (["--data", "x", "--validation", "1"], "fraction"),
    ],
)
def test_settings_that_cannot_work_together_are_an_error(arguments, message):
    with pytest.raises(cli.InputError, match=message):
        settings(*arguments)


def test_without_an_llm_it_stops_before_anything_is_transcribed(corpus, folder, tmp_path):
    result = script(SCRIPT, "--data", corpus, "--recogniser", folder, "--llm", tmp_path / "none", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "without an LLM there is no gold" in result.stderr
    assert not list(tmp_path.glob("out-gold/*"))


def test_a_run_with_an_llm_freezes_its_gold_and_scores_against_it(corpus, folder, llm_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--data",
        corpus,
        "--limit",
        20,
        "--validation",
        0.5,
        "--recogniser",
        folder,
        "--llm",
        llm_folder,
        "--epochs",
        1,
        "--output",
        out,
    ]
    given = settings(*arguments)
    with pytest.raises(cli.RunError, match="0 samples to train on"):  # what it memorised is far from any transcript
        recipe.run(given)
    shutil.rmtree(out)
    recipe.run(settings(*arguments, "--max-distance", 100))
    gold = [json.loads(line) for line in (out / "gold.jsonl").read_text().splitlines()]
    results = json.loads((out / "evaluation_results.json").read_text())
    held_out = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert len(gold) == 20 and len(held_out) == results["counts"]["held_out"] == 10
    assert {line["id"]: line["gold"] for line in held_out}.items() <= {
        line["id"]: line["gold"] for line in gold
    }.items()
    assert set(results["held_out"]["all"]) == {"gold", "human"} and results["gold_quality"]["training"]["samples"]
    assert "hears nothing" in results["gold"] and "how good the gold is" in capsys.readouterr().out


def test_a_run_on_folders_reports_clean_and_noisy_apart(recordings, folder, llm_folder, tmp_path):
    out = tmp_path / "out"
    recipe.run(
        settings(
            "--audio-dir",
            recordings,
            "--validation",
            0.4,
            "--recogniser",
            folder,
            "--llm",
            llm_folder,
            "--max-distance",
            100,
            "--epochs",
            1,
            "--batch-size",
            1,
            "--output",
            out,
        )
    )
    results = json.loads((out / "evaluation_results.json").read_text())
    samples = {part: numbers["gold"] and numbers["gold"]["samples"] for part, numbers in results["held_out"].items()}
    assert samples["all"] == samples["clean"] + samples["noisy"] > 0
    assert all(numbers["human"] is None for numbers in results["held_out"].values())  # nobody wrote them down
    assert results["gold_quality"] == {"training": None, "held_out": None}


def test_a_run_as_a_user_starts_it_says_oracle_everywhere_and_is_not_overwritten(corpus, folder, tmp_path):
    arguments = [SCRIPT, "--data", corpus, "--oracle", "--recogniser", folder, "--epochs", 2, "--learning-rate", 1e-2]
    result = script(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out-gold"
    assert {path.name for path in out.iterdir()} == {
        "settings.json",
        "gold.jsonl",
        "log.jsonl",
        "adapter",
        "held_out.jsonl",
        "evaluation_results.json",
    }
    results = json.loads((out / "evaluation_results.json").read_text())
    assert recipe.ORACLE in result.stdout
    assert results["gold"] == json.loads((out / "settings.json").read_text())["gold"] == recipe.ORACLE
    assert results["counts"]["training"] + results["counts"]["held_out"] == 40
    with pytest.raises(cli.InputError, match="holds a run already"):
        recipe.run(settings(*arguments[1:]))


@pytest.mark.skipif(
    "SPEECHOCEAN762" not in os.environ, reason="needs the real corpus: set SPEECHOCEAN762 to its folder"
)
def test_all_texts_of_the_real_corpus_fit_the_alphabet(recogniser):
    for split in ("train", "test"):
        for utterance in data.read_corpus(os.environ["SPEECHOCEAN762"], split):
            text, lost = recogniser.normalise(utterance.text)
            assert text == utterance.text and not lost
