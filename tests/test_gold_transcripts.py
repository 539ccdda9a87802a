"""recipes/gold_transcripts.py: what could silently be wrong. Real transformers classes, tiny and random."""

from collections import Counter
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

from conftest import read_lines
import numpy as np
from peft import PeftModel
import pytest
from safetensors.torch import load_file
import soundfile
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM

import data
from recipes import common
from recipes import gold_transcripts as recipe
import tiny


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


def sample(id, seconds=1.0, human="A CAT", seed=0):
    return recipe.Sample(id, "all", id, lambda: sound(seconds, seed), human)


def test_a_transcript_joins_runs_and_keeps_letters_that_a_blank_parts(recogniser):
    symbols = ["<s>", "H", "H", "E", "<pad>", "L", "<pad>", "L", "O", "|", "|", "A", "<unk>"]
    ids = [recipe.SYMBOLS.index(symbol) for symbol in symbols]
    assert recogniser.decode(F.one_hot(torch.tensor(ids), 32).float()) == "HELLO A"
    assert recogniser.processor.tokenizer.decode(ids[1:-1]) == "HELLO A"  # the library's own, without special symbols


@pytest.mark.parametrize(
    "text, kept, lost",
    [
        ("He's here, isn't he?", "HE'S HERE ISN'T HE", ""),
        ("don’t — “stop”", "DON'T STOP", ""),
        ("Room 12, déjà vu", "ROOM DJ VU", "12ÉÀ"),
    ],
)
def test_text_is_brought_into_the_alphabet_and_what_is_lost_is_said(recogniser, text, kept, lost):
    assert recogniser.normalise(text) == (kept, lost)


def test_targets_are_the_real_tokenizers_and_small_letters_where_it_has_small_ones(recogniser):
    for text in ("A", "IT'S A QUIZ", "HELLO WORLD"):
        kept, _ = recogniser.normalise(text.lower())
        assert recogniser.encode(kept) == recogniser.processor.tokenizer(text).input_ids
    recogniser.letters = {symbol.lower(): id for symbol, id in recogniser.letters.items()}
    recogniser.capitals = False
    assert recogniser.normalise("It's ME") == ("it's me", "")


def test_the_gradient_of_a_step_is_the_mean_over_its_characters_whoever_shares_it(recogniser):
    texts = {"A": ("short", 0.6), "HELLO CAT": ("long", 1.5)}
    batch = [(sample(*about, seed=len(text)), recogniser.encode(text)) for text, about in texts.items()]
    named = common.trained(recogniser.network)

    def gradient(samples):
        losses = sum(loss for _, loss in recipe.losses(recogniser, samples))
        gradients = torch.autograd.grad(losses, named.values(), allow_unused=True)
        return {name: value for name, value in zip(named, gradients) if value is not None}

    together, reverse, short, long = map(gradient, (batch, batch[::-1], batch[:1], batch[1:]))
    assert any(value.norm() > 0 for value in together.values())
    for name, value in together.items():
        torch.testing.assert_close(value, (1 * short[name] + 9 * long[name]) / 10, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, reverse[name], rtol=1e-4, atol=1e-5)


def test_what_ctc_cannot_align_is_left_out_by_name_and_nothing_else(recogniser):
    recogniser.network.config.mask_time_length = 1
    found = []
    for text, seconds in itertools.product(("AB", "AA", "ABBA", "HELLO"), np.arange(0.06, 0.4, 0.04)):
        one = sample(text, seconds)
        _, too_short = recipe.choose_training([{"baseline": "", "gold": text}], [one], recogniser)
        loss = recipe.ctc_loss(recogniser.logits(one.audio()), recogniser.encode(text), 0)
        found.append(bool(torch.isinf(loss)))
        assert too_short == [text] * found[-1]
    assert len({*found}) == 2


def test_a_clip_shorter_than_a_time_mask_or_transcribed_as_its_gold_is_left_out(recogniser):
    lines = [{"id": id, "baseline": "A CAT", "gold": gold} for id, gold in zip("abc", ("A CAT", "A BAT", None))]
    samples = [sample(id) for id in "abc"]
    ((one, target),), too_short = recipe.choose_training(lines, samples, recogniser)
    assert (one.id, target, too_short) == ("b", recogniser.encode("A BAT"), [])
    recogniser.network.config.update({"mask_time_prob": 0.05, "mask_time_length": 100})
    assert recipe.choose_training(lines, samples, recogniser) == ([], ["b"])


def test_gold_is_rejected_with_its_reason_and_nothing_empty_is_sent(recogniser, tmp_path):
    alphabet = "characters outside the alphabet"
    expected = {  # transcript: answer, gold, verdict
        "A KAT": ("A cat.", None, "too far from the transcript"),
        "ONE TWO THREE FOUR": ("One two three five!", "ONE TWO THREE FIVE", "kept"),
        "HE WENT": ("Once upon a day he went on", None, "too far from the transcript"),
        "LONG": (None, None, "answer did not end"),
        "NOTHING": ('\n""', None, "empty answer"),
        "SAME": ("Same", "SAME", "kept"),
        "ROOM": ("Room 12", None, alphabet),
        "": (None, None, "empty transcript"),
    }
    asked = []
    llm = SimpleNamespace(rewrite=lambda texts: asked.extend(texts) or [expected[text][0] for text in texts])
    given = recipe.Settings(llm_batch=3, max_distance=0.25, output=tmp_path)
    samples = [sample(str(i), human=None) for i in range(len(expected))]
    lines = recipe.write_gold(samples, list(expected), recogniser, llm, given)
    assert sorted(asked) == sorted(expected)[1:]
    assert {line["baseline"]: (line["answer"], line["gold"], line["verdict"]) for line in lines} == expected
    assert [line["distance"] for line in lines[:3]] == [0.5, 0.25, 2.5]
    assert read_lines(tmp_path / "gold.jsonl") == lines


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("He went home.", "He went home."),
        ("Corrected sentence: “He went home.”", "He went home."),
        ("Sure! Here is the corrected transcript:\nHe went home.\nI changed one word.", "He went home."),
        ("The answer is no", "The answer is no"),
    ],
)
def test_an_answer_is_its_first_sentence_without_label_and_quotes(answer, sentence):
    assert recipe.clean_answer(answer) == sentence


def test_the_llm_answers_a_padded_row_as_it_answers_it_alone(tmp_path):
    """A tiny random Mistral with a chat template, as a checkpoint folder."""
    tokenizer = tiny.new_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    MistralForCausalLM(MistralConfig(**sizes, **options)).save_pretrained(tmp_path)
    llm = recipe.Llm(str(tmp_path), None, 12)
    llm.ends = set(range(len(tokenizer)))  # whatever it writes is an answer
    long, short = llm.rewrite(["HE WENT TOO SKOOL WITH HIS BROTHER", "A KAT"])
    assert llm.rewrite(["A KAT"]) == [short] != [long]


@torch.no_grad()
def logits(recogniser):
    recogniser.network.eval()
    return recogniser.logits(sound(1.0, seed=5))


def test_an_adapter_reloaded_and_merged_computes_what_was_trained_head_included(folder, recogniser, tmp_path):
    chosen = [(sample(id, seed=i), recogniser.encode("A CAT")) for i, id in enumerate("ab")]
    before = logits(recogniser)
    summary = recipe.train(recogniser, chosen, recipe.Settings(epochs=3, learning_rate=1e-2, output=tmp_path))
    after = logits(recogniser)
    assert (after - before).abs().max() > 0.1
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    base = recipe.Recogniser(str(folder), 0.0)
    base.network = PeftModel.from_pretrained(base.network, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), after, rtol=0, atol=0)
    base.network = base.network.merge_and_unload()
    torch.testing.assert_close(logits(base), after, rtol=1e-4, atol=1e-5)
    assert len(read_lines(tmp_path / "log.jsonl")) == summary["steps"] == 3
    names = list(common.trained(recogniser.network))
    assert len(names) == 2 * 4 * 2 + 2  # A and B of four projections in two layers; weight and bias of the head
    assert all("lora_" in name and ".attention." in name or "lm_head" in name for name in names)


def test_a_clean_recording_and_its_noisy_copy_are_held_out_together(tmp_path):
    for path in (tmp_path / name / f"{i}.wav" for i in range(5) for name in ("clean", "noisy")):
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, sound(0.5, seed=1), 16000)
    samples = recipe.read_samples(recipe.Settings(audio_dir=tmp_path))
    training, held_out = data.hold_out_speakers(samples, 0.4, seed=0)
    assert Counter(one.condition for one in held_out) == {"clean": 2, "noisy": 2} and len(training) == 6
    assert not {one.speaker for one in training} & {one.speaker for one in held_out}


def test_error_rates_are_pooled_and_a_line_without_reference_is_left_out():
    texts = [("a", "ONE TWO THREE", "ONE", "ONE TWO THREE"), ("b", "A", "B C", ""), ("b", None, "X", "Y")]
    lines = [dict(zip(("speaker", "human", "baseline", "tuned"), line)) for line in texts]
    numbers = recipe.compare(lines, "human", "baseline", "tuned")
    assert numbers["samples"] == numbers["speakers"] == 2
    assert numbers["baseline"]["wer"] == 4 / 4 and numbers["tuned"]["wer"] == 1 / 4
    assert numbers["baseline"]["cer"] == (10 + 3) / 14 and numbers["tuned"]["cer"] == 1 / 14  # spaces count
    assert (numbers["tuned"]["error_samples"], numbers["tuned"]["empty"]) == (1, 1)
    assert numbers["difference"]["wer"] == -0.75 == numbers["difference"]["wer_relative"]
    assert recipe.compare(lines[2:], "human", "baseline", "tuned") is None


@pytest.mark.parametrize(
    "how, references, said",
    [
        ({"max_distance": 100}, {"gold", "human"}, "which hears nothing"),
        ({"oracle": True}, {"human"}, recipe.ORACLE),
    ],
)
def test_a_run_freezes_its_gold_and_says_what_it_is(how, references, said, corpus, folder, monkeypatch, capsys):
    echo = SimpleNamespace(rewrite=lambda transcripts: [f"{transcript} A" for transcript in transcripts])
    monkeypatch.setattr(recipe, "Llm", lambda *_: echo)
    recipe.run(recipe.Settings(data=str(corpus), recogniser=folder, limit=20, validation=0.5, epochs=1, **how))
    results = json.loads(Path("out-gold/evaluation_results.json").read_text())
    gold, held_out = (
        {line["id"]: line["gold"] for line in read_lines(Path(f"out-gold/{name}.jsonl"))}
        for name in ("gold", "held_out")
    )
    assert len(gold) == 20 and len(held_out) == results["counts"]["held_out"] == 10
    assert held_out.items() <= gold.items()
    assert set(results["held_out"]["all"]) == references and bool(results["gold_quality"]) == ("gold" in references)
    assert said in results["gold"] and said in capsys.readouterr().out
