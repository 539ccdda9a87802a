from dataclasses import replace
import io
import json
import os
from pathlib import Path
import pickle
import shutil

from bitsandbytes.nn import Linear4bit
from conftest import ROOT, greedy
import numpy as np
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
import pytest
from safetensors.torch import load_file, save_file
import soundfile
from tokenizers import Tokenizer
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoTokenizer, Phi4MultimodalConfig, Phi4MultimodalForCausalLM

import data
import model as models
import prompts
from support import cli, pretrained

# strategy and --speech-adapter: "full" has no LoRA, so there is none to continue
WAYS = [
    (strategy, way)
    for strategy in models.STRATEGIES
    for way in models.SPEECH_ADAPTERS
    if (strategy, way) != ("full", "continue")
]
SETTINGS = {"strategy": "lora", "dtype": "float32"}


def gradients(model, micro_batches):
    """Summed loss, and the gradient of every trained parameter, as the training loop makes them."""
    supervised = sum(len(example.answer_ids) for micro_batch in micro_batches for example in micro_batch)
    model.zero_grad()
    total = 0.0
    for micro_batch in micro_batches:
        loss = model(model.prepare(micro_batch)) / supervised
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def train_one_step(model, examples, rate=1e-3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        gradients(model, [examples])
        optimiser.step()


def score(model, utterances):
    return model.score_distributions(utterances, model.audio_embeddings(utterances))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def lengths_mask(examples):
    lengths = torch.tensor([len(example) for example in examples])
    return (torch.arange(max(lengths)) < lengths[:, None]).long()


def logits(model, examples):
    """Logits at every position of a batch, by transformers' own forward."""
    batch = model.prepare(examples)
    with torch.no_grad():
        audio = model.audio_embeddings([example.utterance for example in examples])
        return model.core(
            inputs_embeds=model._inputs_embeds(batch.input_ids, batch.placeholders, audio),
            attention_mask=lengths_mask(examples),
        ).logits


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def test_the_loss_of_a_padded_batch_equals_that_of_its_rows_alone(new_model, examples):
    model, batch = new_model(), examples[:8]
    assert len({len(example) for example in batch}) > 2
    with torch.no_grad():
        together, *alone = (model(model.prepare(rows)) for rows in (batch, *([example] for example in batch)))
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_eight_micro_batches_of_one_and_one_of_eight_give_equal_gradients(new_model, examples):
    model, batch = new_model(), examples[:8]
    loss, one = gradients(model, [batch])
    other_loss, eight = gradients(model, [[example] for example in batch])
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert one.keys() == eight.keys() and any(gradient.norm() > 0 for gradient in one.values())
    for name in one:
        assert relative(eight[name], one[name]) < 1e-5, name


def test_the_loss_equals_transformers_own_on_the_same_batch(new_model, examples):
    model, batch = new_model(), examples[:4]
    prepared, labels = model.prepare(batch), data.collate(batch, model.pad_id)["labels"]
    audio = model.embed(prepared.recordings)
    with torch.no_grad():
        mean = model.core(
            inputs_embeds=model._inputs_embeds(prepared.input_ids, prepared.placeholders, audio),
            attention_mask=lengths_mask(batch),
            labels=torch.as_tensor(labels),
        ).loss
        ours = model(prepared) / sum(len(example.answer_ids) for example in batch)
    assert ours.item() == pytest.approx(mean.item(), rel=1e-5)


def test_only_the_answer_changes_the_loss(new_model, examples):
    """A label in the prompt or in padding would show here: the sum over single supervised tokens is the loss."""
    model, example = new_model(), examples[0]
    scores = torch.log_softmax(logits(model, [example])[0], dim=-1)
    start = len(example.prompt_ids)
    expected = -sum(scores[start - 1 + i, token] for i, token in enumerate(example.answer_ids))
    with torch.no_grad():
        assert model(model.prepare([example])).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("strategy", models.STRATEGIES)
def test_bfloat16_weights_under_autocast_train_in_float32_and_stay_near_it(new_model, examples, utterances, strategy):
    """The arithmetic of a GPU run, on a CPU."""
    model = new_model(strategy, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(model, [examples[:4], examples[4:8]])
        greedy(model.eval(), utterances[:3], "APA", 5)
    exact, expected = gradients(new_model(strategy), [examples[:8]])
    assert loss == pytest.approx(exact, rel=0.02)
    for name, gradient in found.items():
        assert gradient.isfinite().all()
    tokens = next(name for name in found if "embed_tokens." in name)
    assert relative(found[tokens], expected[tokens]) < 0.2


# ----------------------------------------------------------------------------------------------------------------------
# Audio


def test_a_clip_has_the_same_embeddings_alone_and_batched_with_longer_clips(new_model, utterances):
    model = new_model()
    ordered = sorted(utterances, key=lambda utterance: utterance.samples)
    batch = [data.log_mel(utterance, model.extractor) for utterance in (ordered[0], ordered[-1], ordered[-2])]
    with torch.no_grad():
        together = model.embed_audio(batch)
        for features, embedding in zip(batch, together, strict=True):
            alone = model.embed_audio([features])[0]
            assert relative(embedding, alone) < 1e-5


def test_embeddings_of_one_clip_are_transformers_own(new_model, utterances):
    model, utterance = new_model(), utterances[0]
    features = data.log_mel(utterance, model.extractor)
    audio = model.core.model.embed_tokens_extend.audio_embed
    ids = torch.full((1, utterance.audio_tokens), model.audio_id)
    with torch.no_grad():
        theirs = audio(
            ids,
            torch.zeros(1, utterance.audio_tokens, model.core.config.hidden_size),
            features[None],
            audio_embed_sizes=torch.tensor([utterance.audio_tokens]),
        )
        ours = model.embed_audio([features])[0]
    assert relative(ours, theirs[0]) < 1e-5


def test_a_clip_above_forty_seconds_keeps_its_embeddings_in_a_batch(new_model):
    model = new_model()
    rng = np.random.default_rng(0)
    long, short = (torch.as_tensor(rng.normal(8, 3, (frames, 80)), dtype=torch.float32) for frames in (4100, 50))
    with torch.no_grad():
        together = model.embed_audio([short, long])
        assert [len(embedding) for embedding in together] == [7, 513]
        for features, embedding in zip((short, long), together):
            assert relative(embedding, model.embed_audio([features])[0]) < 1e-5


def test_every_block_of_the_encoder_is_called_once_for_a_batch_whatever_the_lengths(new_model):
    """Processes that share its weights wait for each other at every call."""
    model, calls = new_model(), []
    for block in model.core.model.embed_tokens_extend.audio_embed.encoder.encoders:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.embed_audio([torch.zeros(frames, 80) for frames in (4100, 50, 9000)])
    assert len(calls) == 2  # the tiny encoder's blocks


@pytest.mark.parametrize("strategy", ["unfreeze", "full"])
def test_checkpointing_reaches_the_audio_encoder_where_it_trains(new_model, examples, strategy):
    exact, model = (torch.manual_seed(0) and new_model(strategy) for _ in range(2))
    model.core.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls, block = [], model.core.model.embed_tokens_extend.audio_embed.encoder.encoders[0]
    block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    (loss, found), (expected_loss, expected) = (gradients(m, [examples[:4:2]]) for m in (model, exact.train()))
    assert len(calls) == 2  # forward, and again for the backward pass
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in expected:  # those of a key's bias are zero but for rounding
        assert relative(found[name], expected[name]) < 1e-4 or "k_proj.bias" in name, name


def test_embeddings_of_a_frozen_encoder_are_equal_to_the_bit_whatever_they_are_asked_for_with(new_model, utterances):
    one, other = new_model(), new_model()
    together, alone = one.audio_embeddings(utterances[:6]), [other.audio_embeddings([u])[0] for u in utterances[:6]]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def count_embedded(model, monkeypatch):
    """A list that gets the number of recordings of each call of the audio encoder."""
    calls, embed = [], model.embed_audio
    monkeypatch.setattr(model, "embed_audio", lambda features: calls.append(len(features)) or embed(features))
    return calls


def test_embeddings_are_computed_once_while_encoder_and_projector_are_frozen(
    new_model, examples, monkeypatch, tmp_path
):
    model = new_model()
    model.keep_audio(tmp_path)
    calls = count_embedded(model, monkeypatch)
    losses = [model(model.prepare(examples[:6])).item() for _ in range(2)]  # three utterances, two tasks each
    assert calls == [1] * 3 and losses[0] == losses[1]

    another_run = new_model()
    another_run.keep_audio(tmp_path)
    calls = count_embedded(another_run, monkeypatch)
    assert another_run(another_run.prepare(examples[:6])).item() == losses[0] and calls == []


def test_an_encoder_that_trains_embeds_a_micro_batch_together_and_nothing_is_kept(
    new_model, examples, monkeypatch, tmp_path
):
    model = new_model("unfreeze")
    model.keep_audio(tmp_path)
    calls = count_embedded(model, monkeypatch)
    for _ in range(2):
        model(model.prepare(examples[:6]))
    assert calls == [6, 6] and list(tmp_path.iterdir()) == []


def test_embeddings_of_other_weights_or_another_type_are_never_used(new_model, utterances, tmp_path):
    model, other, half = new_model(), new_model(), new_model(dtype="bfloat16")
    other.core.model.embed_tokens_extend.audio_embed.down_proj_for_speech.bias.data[0] += 1
    found = []
    for changed in (model, other, half):
        changed.keep_audio(tmp_path)
        found.append(changed.audio_embeddings(utterances[:1])[0])
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(found[0], found[1]) and found[2].dtype == torch.bfloat16
    assert all(
        torch.equal(changed.audio_embeddings(utterances[:1])[0], embeddings)
        for changed, embeddings in zip((model, other, half), found)
    )


class Allocated(TorchDispatchMode):
    """Bytes of all tensors of a matrix' size that are made, views of others left out."""

    def __init__(self, matrix):
        super().__init__()
        self.size, self.bytes = matrix.numel(), 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **keywords or {})
        known = {x.untyped_storage().data_ptr() for x in tree_flatten(arguments)[0] if isinstance(x, torch.Tensor)}
        for made in tree_flatten(results)[0]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes += made.nbytes * (made.numel() == self.size)
        return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_the_control_tokens_enter_loss_and_gradient_as_in_pefts_own_layers_without_a_copy_of_the_matrix(
    new_model, examples, monkeypatch, dtype
):
    """PEFT puts the trained rows into a copy of the matrix, for the embedding and for the head tied to it."""
    model = new_model(dtype=dtype)
    matrix = model.core.get_input_embeddings().token_adapter.base_layer.weight
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    rows.data += torch.randn_like(rows)
    for layer in (model.core.get_input_embeddings(), model.core.lm_head):
        frozen, trained = models._trained_rows(layer)
        assert frozen.weight is matrix and [*trained] == models.control_token_ids(model.tokenizer)
    batch = model.prepare(examples[:4])
    audio = model.embed(batch.recordings)
    made = {}
    for whose in ("ours", "PEFT's"):
        if whose == "PEFT's":
            monkeypatch.setattr(models, "_rows", lambda layer, tokens: layer(tokens))
            monkeypatch.setattr(model, "_logits", lambda hidden: model.core.lm_head(hidden))
        with Allocated(matrix) as made[whose]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model.loss(batch, audio)
            loss.backward()
        made[whose].result, rows.grad = (loss.item(), rows.grad), None
    assert made["ours"].bytes == 0 and made["PEFT's"].bytes >= 4 * matrix.nbytes  # two copies and two gradients
    exact = 1e-5 if dtype == "float32" else 0.02
    (ours, gradient), (theirs, expected) = (m.result for m in made.values())
    assert ours == pytest.approx(theirs, rel=exact)
    assert expected.norm() > 0 and relative(gradient, expected) < exact


@pytest.mark.parametrize("merged", [False, True])
def test_answers_allocate_no_copy_of_the_matrix_while_the_model_trains_and_after(new_model, utterances, merged):
    model = new_model().eval()
    if merged:
        models.merge_rows(model)
    matrix = model.core.get_input_embeddings().token_adapter.base_layer.weight
    audio = model.audio_embeddings(utterances[:2])
    with Allocated(matrix) as made:
        model.generate(utterances[:2], audio, "APA", 3)
        model.score_distributions(utterances[:2], audio)
    assert made.bytes == 0


def test_a_batch_with_the_wrong_number_of_placeholders_is_refused(new_model, examples):
    model = new_model()
    audio = model.audio_embeddings([examples[0].utterance])
    with pytest.raises(ValueError, match="audio placeholders for"):
        model.loss(model.prepare([examples[0]]), [audio[0][1:]])


def test_what_is_compared_is_computed_in_float32_where_the_weights_are_bfloat16(new_model):
    """Hidden states whose two likeliest tokens are often equal in bfloat16."""
    model = new_model(dtype="bfloat16")
    weight = model.core.lm_head.token_adapter.base_layer.weight
    hidden = 20 * torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = hidden.double() @ weight.double().T  # (400, V)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = torch.arange(11).expand(len(hidden), -1)
        exact, rounded = model._exact_logits(hidden, tokens), model._logits(hidden)
        assert model._likeliest(hidden).tolist() == expected.argmax(dim=1).tolist()
    assert rounded.argmax(dim=1).tolist() != expected.argmax(dim=1).tolist()
    assert exact.dtype == torch.float32 and relative(exact, expected[:, :11]) < 1e-5 < relative(rounded, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Control tokens in spare rows


def test_a_spare_row_that_is_next_to_nothing_starts_from_the_users(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    (matrix,) = (weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    as_it_is = models.load_base(str(folder), None, "float32", "sdpa", "merge")
    apa, mdd = models.control_token_ids(as_it_is.tokenizer)
    assert as_it_is.started_rows == []
    assert torch.equal(as_it_is.core.get_input_embeddings().weight[[apa, mdd]], matrix[[apa, mdd]])
    matrix[mdd] *= 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = models.load_base(str(folder), None, "float32", "sdpa", "merge")
    rows, user = model.core.get_input_embeddings().weight, model.tokenizer.convert_tokens_to_ids(prompts.USER)
    assert model.started_rows == [prompts.CONTROL_TOKENS["MDD"]]
    assert torch.equal(rows[mdd], rows[user]) and torch.equal(rows[apa], matrix[apa])
    assert torch.equal(model.core.lm_head.weight[mdd], rows[user])


# ----------------------------------------------------------------------------------------------------------------------
# How far training has moved the model


@pytest.mark.parametrize("speech_adapter", models.SPEECH_ADAPTERS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_has_moved_is_measured_from_where_training_began(new_model, examples, speech_adapter, quantize):
    model = new_model(speech_adapter=speech_adapter, quantize=quantize)
    layers = {name: layer for name, layer in model.core.named_modules() if isinstance(layer, LoraLayer)}
    before = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    assert models.moved(model) == {"adapter_moved": pytest.approx(0, abs=1e-7), "control_tokens_moved": 0}
    assert "next to nothing" in models.describe_moved(models.moved(model))
    train_one_step(model, examples[:8])
    found = models.moved(model)
    shares = []
    for name, layer in layers.items():
        weight = dequantize_module_weight(layer.get_base_layer())
        shares.append((layer.get_delta_weight("default") - before[name]).norm() / weight.norm())
    assert found["adapter_moved"] == pytest.approx(torch.stack(shares).median().item(), rel=1e-3)
    assert found["adapter_moved"] > 1e-4 and found["control_tokens_moved"] > 1e-4
    assert "next to nothing" not in models.describe_moved(found)


def test_a_model_without_an_adapter_has_not_moved(new_model):
    assert models.moved(new_model("full")) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.fixture(scope="module")
def fluent(checkpoint, utterances):
    """A model that has learnt enough of a few utterances to write different answers."""
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", "merge")
    models.add_adapter(model, 16, 32, 0.0)
    models.set_trainable(model, "unfreeze")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    examples = list(data.Examples(utterances[::5], model.tokenizer, model.audio_id))
    for _ in range(120):
        gradients(model, [examples])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("task", prompts.TASKS)
def test_the_text_of_an_utterance_does_not_depend_on_its_batch(fluent, utterances, task):
    chosen = [*utterances[::5], utterances[1]]
    texts = [[greedy(fluent, chosen[i : i + size], task, 40) for i in range(0, 9, size)] for size in (1, 3, 9)]
    one, three, nine = ([answer for batch in batches for answer in batch] for batches in texts)
    assert one == three == nine
    assert len({text for text, _, _ in one}) > 2


@pytest.mark.parametrize("task", prompts.TASKS)
def test_answers_are_those_of_transformers_own_generate(fluent, utterances, task):
    """One utterance at a time, from ids and features, with its cache."""
    answers = greedy(fluent, utterances[:4], task, 25)
    for utterance, (text, length, truncated) in zip(utterances[:4], answers, strict=True):
        input_ids = torch.tensor([data.encode_prompt(utterance, task, fluent.tokenizer, fluent.audio_id)])
        sequence = fluent.core.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=25,
            do_sample=False,
            audio_input_features=data.log_mel(utterance, fluent.extractor)[None],
            audio_embed_sizes=torch.tensor([utterance.audio_tokens]),
            eos_token_id=fluent.tokenizer.convert_tokens_to_ids(prompts.END),
        )[0, input_ids.shape[1] :]
        assert fluent.tokenizer.decode(sequence) == text + prompts.END * (not truncated) and len(sequence) == length


@pytest.mark.parametrize("task", prompts.TASKS)
def test_what_was_learnt_by_heart_is_written_and_parsed(fluent, utterances, task):
    outputs = [prompts.parse_output(task, text) for text, _, _ in greedy(fluent, utterances[::5], task, 60)]
    assert len(outputs) == 8 and None not in outputs


LENGTHS = (
    1.2,
    20.4,
    3.5,
    2.1,
    8.1,
    3.4,
    5.0,
    1.9,
    2.7,
)  # seconds: the corpus' shortest, longest, median, 95th percentile


@pytest.fixture(scope="module")
def long_and_short(utterances):
    """Recordings as long as the real corpus' are."""

    def record(utterance, seconds):
        audio, file = data.read_audio(utterance.recording), io.BytesIO()
        samples = int(seconds * data.SAMPLE_RATE)
        soundfile.write(file, np.resize(audio, samples), data.SAMPLE_RATE, format="WAV")
        return replace(utterance, recording=file.getvalue, samples=samples)

    return [record(utterance, seconds) for utterance, seconds in zip(utterances, LENGTHS)]


def test_greedy_texts_and_expected_scores_do_not_depend_on_the_batch_at_real_lengths(fluent, long_and_short):
    texts, distributions = [], []
    for size in (1, 3, 8):
        batches = [long_and_short[i : i + size] for i in range(0, len(long_and_short), size)]
        texts.append(
            [answer for batch in batches for task in prompts.TASKS for answer in greedy(fluent, batch, task, 40)]
        )
        texts[-1] = sorted(texts[-1])
        distributions.append(torch.cat([score(fluent, batch) for batch in batches]))
    assert texts[0] == texts[1] == texts[2]
    values = torch.arange(11.0)
    expected = [(d * values).sum(dim=-1) for d in distributions]
    assert (expected[0] - expected[1]).abs().max() < 1e-4 and (expected[0] - expected[2]).abs().max() < 1e-4
    assert expected[0].std(dim=0).min() > 0.01  # they differ between recordings, as they should


def test_score_distributions_are_those_of_the_whole_answer_read_at_once(fluent, utterances):
    """Without a cache: transformers' own forward over prompt and answer, read where the scores stand."""
    batch = utterances[:3]
    distributions = score(fluent, batch)
    before, values = data.encode_score_slots(fluent.tokenizer)
    for utterance, ours in zip(batch, distributions, strict=True):
        modes = [values[i] for i in ours.argmax(dim=-1)]
        answer = sum(([*text, value] for text, value in zip(before, modes)), [])
        prompt = data.encode_prompt(utterance, "APA", fluent.tokenizer, fluent.audio_id)
        scores = logits(fluent, [data.Example(utterance, "APA", prompt, answer)])[0]
        places = len(prompt) + torch.tensor([len(text) + 1 for text in before]).cumsum(dim=0) - 2
        theirs = scores[places][:, values].softmax(dim=-1)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_likeliest_scores_are_those_that_greedy_decoding_writes(fluent, utterances):
    written = [prompts.parse_output("APA", text) for text, _, _ in greedy(fluent, utterances[::5], "APA", 60)]
    likeliest = score(fluent, utterances[::5]).argmax(dim=-1).tolist()
    assert [list(scores.values()) for scores in written] == likeliest


@pytest.mark.parametrize("token, expected", [(prompts.END, ("", 1, False)), ("<|user|>", ("<|user|>" * 3, 3, True))])
def test_generation_stops_at_the_end_token_and_says_when_it_did_not(new_model, utterances, token, expected):
    model = new_model().eval()
    favourite = torch.zeros(model.core.config.vocab_size)
    favourite[model.tokenizer.convert_tokens_to_ids(token)] = 1
    model._logits = lambda hidden: favourite.expand(len(hidden), -1)
    assert greedy(model, utterances[:2], "MDD", 3) == [expected] * 2


def test_the_attention_setting_is_the_language_models_and_gives_the_same_logits(checkpoint, examples):
    sdpa, eager = (models.load_base(str(checkpoint), None, "float32", name, "merge") for name in ("sdpa", "eager"))
    assert eager.core.config._attn_implementation == "eager"
    assert eager.core.model.embed_tokens_extend.audio_embed.encoder.config._attn_implementation == "sdpa"
    assert torch.allclose(logits(sdpa, examples[:2]), logits(eager, examples[:2]), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("strategy, speech_adapter", WAYS)
def test_a_step_changes_exactly_the_chosen_groups(new_model, examples, strategy, speech_adapter):
    model = new_model(strategy, speech_adapter)
    before = {name: p.detach().clone() for name, p in model.core.named_parameters()}
    train_one_step(model, examples[:8])
    changed = {name for name, p in model.core.named_parameters() if not torch.equal(p, before[name])}
    groups = [
        {name for name in changed if models.re.search(models.PARAMETER_GROUPS[group], name)}
        for group in models.STRATEGIES[strategy]
    ]
    assert all(groups) and changed == set().union(*groups)
    assert not any("audio_embed" in name and "lora" in name for name in before)


def test_counts_are_those_of_the_groups(new_model):
    model = new_model("unfreeze", rank=4)
    hidden, mlp, qkv = 128, 256, 128 + 2 * 64
    per_layer = 4 * ((hidden + qkv) + (hidden + hidden) + (hidden + 2 * mlp) + (mlp + hidden))
    assert model.counts["LoRA"] == 3 * per_layer
    assert model.counts["control tokens"] == 2 * hidden
    audio = model.core.model.embed_tokens_extend.audio_embed
    assert model.counts["audio encoder"] == sum(p.numel() for p in audio.encoder.parameters())
    assert model.counts["audio projector"] == 96 * hidden + hidden + hidden * hidden + hidden


def full_size(strategy, rank=None, targets=models.LORA_TARGETS):
    """The real architecture with what a strategy trains, on the meta device; the names of its modules with LoRA."""
    with torch.device("meta"):
        network = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(num_attention_heads=24, tie_word_embeddings=True))
        model = models.SpeechModel(network, None, None)
        if strategy != "full":
            tokens = {"embed_tokens": [200029, 200030]}
            config = LoraConfig(r=rank, target_modules=targets, trainable_token_indices=tokens)
            model.network = get_peft_model(network, config)
    return model, models.set_trainable(model, strategy)


LANGUAGE_MODEL, ENCODER, PROJECTOR, ROWS = 3_836_021_760, 441_254_144, 12_589_056, 2 * 3072


def test_the_memory_that_full_takes_is_counted_and_refused_before_the_weights_are_read(tmp_path):
    model, counts = full_size("full")
    trained = sum(counts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = 18 * trained + 2 * (total - trained)
    assert sum(models.memory_of_full(model.core).values()) == expected == 78_125_847_424
    Phi4MultimodalConfig(num_attention_heads=24, tie_word_embeddings=True).save_pretrained(tmp_path)
    models.check_memory(tmp_path, None, expected)
    with pytest.raises(cli.InputError, match=r"78\.1 GB before activations .*the GPU has 78\.1: .*--shard"):
        models.check_memory(tmp_path, None, expected - 1)


@pytest.mark.parametrize(
    "strategy, rank, counts",
    [
        ("lora", 64, {"LoRA": 92_274_688, "control tokens": ROWS}),
        ("lora", 320, {"LoRA": 461_373_440, "control tokens": ROWS}),
        (
            "unfreeze",
            64,
            {"LoRA": 92_274_688, "control tokens": ROWS, "audio encoder": ENCODER, "audio projector": PROJECTOR},
        ),
        ("full", None, {"language model": LANGUAGE_MODEL, "audio encoder": ENCODER, "audio projector": PROJECTOR}),
    ],
)
def test_what_each_strategy_trains_at_full_size(strategy, rank, counts):
    """Rank 320 is the shipped speech adapter's, 923 MB in bfloat16; the table in docs/running.md has these numbers."""
    model, found = full_size(strategy, rank)
    assert found == counts
    adapted = [name for name, module in model.core.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == (0 if strategy == "full" else 32 * 4)
    assert all(name.startswith("model.layers.") for name in adapted)
    page = (ROOT / "docs" / "running.md").read_text()
    assert f"{sum(counts.values()):,}" in page and f"{sum(p.numel() for p in model.core.parameters()):,}" in page


def test_of_the_embedding_only_the_rows_of_the_control_tokens_train(new_model, examples):
    model = new_model()
    before = model.core.get_input_embeddings().weight.detach().clone()
    train_one_step(model, examples[:8])
    changed = (model.core.get_input_embeddings().weight != before).any(dim=1)
    assert torch.nonzero(changed).flatten().tolist() == models.control_token_ids(model.tokenizer)


def test_a_group_that_matches_nothing_is_an_error(new_model, monkeypatch):
    monkeypatch.setitem(models.PARAMETER_GROUPS, "audio encoder", "no_such_module")
    with pytest.raises(ValueError, match="no parameter belongs to group 'audio encoder'"):
        new_model("unfreeze")


def test_continue_trains_the_shipped_adapter_at_its_own_rank(new_model, checkpoint):
    config = json.loads((checkpoint / models.SPEECH_ADAPTER / "adapter_config.json").read_text())
    model = new_model(speech_adapter="continue", rank=4)
    assert model.network.peft_config["default"].r == config["r"] != 4
    shipped = load_file(checkpoint / models.SPEECH_ADAPTER / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(model.network)
    assert all(torch.equal(ours[key], value) for key, value in shipped.items())


def test_merge_and_continue_start_from_the_same_function_and_none_does_not(new_model, examples):
    outputs = {way: logits(new_model(speech_adapter=way).eval(), examples[:2]) for way in models.SPEECH_ADAPTERS}
    assert torch.allclose(outputs["merge"], outputs["continue"], atol=1e-4)
    assert not torch.allclose(outputs["merge"], outputs["none"], atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def reload(checkpoint, folder, speech_adapter, strategy="lora"):
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", speech_adapter)
    models.load_trained(model, folder, strategy)
    return model


@pytest.mark.parametrize("strategy, speech_adapter", WAYS)
def test_a_reloaded_adapter_gives_the_same_logits_and_differs_from_the_base(
    new_model, checkpoint, examples, tmp_path, strategy, speech_adapter
):
    model = new_model(strategy, speech_adapter)
    untrained = logits(model.eval(), examples[:1])
    train_one_step(model, examples[:8])
    expected = logits(model.eval(), examples[:1])
    models.save_trained(model, tmp_path / "epoch-1", {"strategy": strategy, "dtype": "float32"})
    again = logits(reload(checkpoint, tmp_path / "epoch-1", speech_adapter, strategy), examples[:1])
    assert torch.equal(again, expected)
    assert not torch.allclose(again, untrained, atol=1e-3)
    assert json.loads((tmp_path / "epoch-1" / "settings.json").read_text())["strategy"] == strategy
    assert (tmp_path / "epoch-1" / models.TRAINED_FILE).exists() == (strategy != "lora")


@pytest.fixture
def saved(new_model, tmp_path):
    models.save_trained(new_model(), tmp_path / "adapter", SETTINGS)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(next(iter(weights))),
        lambda weights: weights.update({"base_model.model.model.layers.9.lora_A.weight": torch.zeros(2)}),
    ],
)
def test_an_adapter_with_missing_or_foreign_keys_is_refused(checkpoint, saved, change):
    weights = load_file(saved / "adapter_model.safetensors")
    change(weights)
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(cli.InputError, match="1 keys differ"):
        reload(checkpoint, saved, "merge")


def test_an_adapter_of_another_rank_is_refused(checkpoint, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(cli.InputError, match="does not fit the model: .* is .*, not "):
        reload(checkpoint, saved, "merge")


def test_a_lora_that_train_py_did_not_write_is_refused(checkpoint, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": None}))
    with pytest.raises(cli.InputError, match="its control tokens are not this base model's"):
        reload(checkpoint, saved, "merge")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": 1e300}, "lora_alpha 1e.300"),
        ({"r": True}, "r True"),
        ({"use_rslora": "no"}, "use_rslora 'no'"),
        ({"fan_in_fan_out": "x"}, "fan_in_fan_out 'x'"),
        ({"alpha_pattern": {"qkv_proj": -1}}, "alpha_pattern .*'qkv_proj'"),
        ({"target_parameters": ["x"]}, "target_parameters .*'x'"),
    ],
)
def test_an_adapters_configuration_of_another_shape_is_named(checkpoint, saved, change, message):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(cli.InputError, match=f"adapter_config.json: {message}"):
        reload(checkpoint, saved, "merge")


@pytest.mark.parametrize("spoil", [lambda weight: weight * float("nan"), lambda weight: weight.long()])
def test_weights_that_are_not_finite_numbers_are_refused(checkpoint, saved, spoil):
    file = saved / "adapter_model.safetensors"
    save_file({name: spoil(weight) for name, weight in load_file(file).items()}, file)
    with pytest.raises(cli.InputError, match="adapter_model.safetensors holds values that are not finite"):
        reload(checkpoint, saved, "merge")


def test_an_adapter_that_is_a_fifo_is_not_waited_for(checkpoint, saved):
    (saved / "adapter_model.safetensors").unlink()
    os.mkfifo(saved / "adapter_model.safetensors")
    with pytest.raises(cli.InputError, match="adapter_model.safetensors is missing, or is not a regular file"):
        reload(checkpoint, saved, "merge")


def test_a_truncated_adapter_file_is_refused(checkpoint, saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(cli.InputError, match="cannot be loaded"):
        reload(checkpoint, saved, "merge")


def test_saving_again_replaces_the_folder_and_leaves_no_temporary_one(new_model, saved):
    before = (saved / "adapter_model.safetensors").read_bytes()
    models.save_trained(new_model(), saved, SETTINGS)
    assert (saved / "adapter_model.safetensors").read_bytes() != before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_folder_with_something_that_was_not_written_here_is_never_replaced(new_model, saved):
    (saved / "mine").write_text("kept")
    before = (saved / "adapter_model.safetensors").read_bytes()
    with pytest.raises(cli.RunError, match=f"{saved} cannot be written: it holds mine, .*move it away"):
        models.save_trained(new_model(), saved, SETTINGS)
    assert (saved / "mine").read_text() == "kept" and (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_text_is_split_as_tokenizer_json_says_whatever_class_the_checkpoint_names(checkpoint, tmp_path):
    """Reported of the real one: it names GPT2TokenizerFast, a class that has its own way to split."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    file = json.loads((folder / "tokenizer.json").read_text())
    digits = {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}|\p{L}+|\s+|[^\s\p{L}\p{N}]"},
        "behavior": "Isolated",
        "invert": False,
    }
    file["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, file["pre_tokenizer"] | {"use_regex": False}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(file))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2TokenizerFast"}))

    text = prompts.mdd_target("WE SEE 10", ["W", "IY"])
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert models.load_base(str(folder), None, "float32", "sdpa", "none").tokenizer.encode(text) == expected
    assert AutoTokenizer.from_pretrained(folder).encode(text) != expected


def test_a_checkpoint_without_the_turn_tokens_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    file = json.loads((folder / "tokenizer.json").read_text())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] != prompts.USER]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(cli.InputError, match=r"has no token <\|user\|>"):
        models.load_base(str(folder), None, "float32", "sdpa", "none")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", {"model_type": "llama"}, "model_type 'llama'"),
        ("config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers 1000000"),
        ("config.json", {"pad_token_id": None}, "pad_token_id None"),
        ("config.json", {"pad_token_id": 10**9}, "token 1000000000 has no row"),
        ("config.json", {"audio_config": {"audio_token_id": 10**9}}, "token 1000000000 has no row"),
        ("config.json", {"audio_config": {"audio_token_id": -1}}, "audio_config.audio_token_id -1"),
        ("config.json", {"sliding_window": -1}, "sliding_window -1"),
        ("preprocessor_config.json", {"hop_length": 80}, "hop_length 80: Input should be 160"),
        ("preprocessor_config.json", {"sampling_rate": "x"}, "sampling_rate 'x'"),
        ("preprocessor_config.json", {"feature_size": 7}, "feature_size 7"),
    ],
)
def test_a_checkpoints_settings_of_another_shape_are_named(checkpoint, tmp_path, name, change, message):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    with pytest.raises(cli.InputError, match=f"{name}: .*{message}") as error:
        pretrained.check(str(folder), None)
        models.load_base(str(folder), None, "float32", "sdpa", "none")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_names_no_end_of_text_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(cli.InputError, match="no end-of-text token: tokenizer_config.json"):
        models.load_base(str(folder), None, "float32", "sdpa", "none")


def test_the_feature_extractor_shares_its_file_with_the_real_checkpoints_image_processor(
    checkpoint, tmp_path, utterances
):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    image = {
        "image_processor_type": "Phi4MultimodalImageProcessorFast",
        "crop_size": 448,
        "dynamic_hd": 36,
        "image_mean": [0.5, 0.5, 0.5],
        "processor_class": "Phi4MultimodalProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config | image))
    ours, theirs = (
        models.load_base(str(path), None, "float32", "sdpa", "none").extractor for path in (checkpoint, folder)
    )
    assert torch.equal(data.log_mel(utterances[0], ours), data.log_mel(utterances[0], theirs))


def test_a_missing_checkpoint_is_an_input_error(tmp_path):
    with pytest.raises(cli.InputError, match="preprocessor_config.json cannot be read"):
        models.load_base(str(tmp_path), None, "float32", "sdpa", "merge")


def test_a_checkpoint_without_its_speech_adapter_is_an_input_error(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(folder / models.SPEECH_ADAPTER)
    with pytest.raises(cli.InputError, match=f"{models.SPEECH_ADAPTER}.* cannot be read"):
        models.load_base(str(folder), None, "float32", "sdpa", "merge")


def test_a_large_model_without_a_gpu_stops_with_the_two_ways_on(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi4_multimodal"}')
    with open(tmp_path / "model-00001-of-00002.safetensors", "wb") as file:
        file.truncate(int(models.LARGEST_CPU_MODEL) + 1)
    with pytest.raises(cli.InputError, match="needs a CUDA GPU.*python tiny.py") as error:
        pretrained.check(tmp_path, None)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# QLoRA


def quantised(model):
    return {name for name, module in model.core.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("speech_adapter", models.SPEECH_ADAPTERS)
def test_nf4_is_for_the_language_models_layers_alone(new_model, speech_adapter):
    model = new_model(speech_adapter=speech_adapter, quantize="nf4")
    layers = {name.removesuffix(".base_layer") for name in quantised(model)}
    assert layers == {
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    extend = model.core.model.embed_tokens_extend
    kinds = {type(module) for module in extend.modules() if isinstance(module, torch.nn.Linear)}
    assert torch.nn.Linear in kinds and not any("4bit" in kind.__name__ for kind in kinds)
    for weight in (
        model.core.get_input_embeddings().weight,
        extend.audio_embed.up_proj_for_speech.weight,
        extend.audio_embed.encoder.embed.out.weight,
    ):
        assert weight.dtype == torch.float32
    layer = next(module for module in model.core.modules() if isinstance(module, Linear4bit))
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested and layer.weight.dtype == torch.uint8
    assert layer.compute_dtype == torch.bfloat16


def test_a_skip_list_that_looks_right_is_found_out(monkeypatch, checkpoint):
    """Without "model." before it, the name keeps nothing of the audio path from being quantised."""
    right = models._nf4()
    right.llm_int8_skip_modules = ["embed_tokens_extend", "lm_head"]
    monkeypatch.setattr(models, "_nf4", lambda: right)
    with pytest.raises(cli.InputError, match="embed_tokens_extend.* is a Linear4bit: nf4 is for the language model's"):
        models.load_base(str(checkpoint), None, "float32", "sdpa", "none", "nf4")


@pytest.mark.parametrize("speech_adapter", models.SPEECH_ADAPTERS)
def test_qlora_trains_the_adapter_alone_and_comes_back_as_it_was(
    new_model, checkpoint, examples, tmp_path, speech_adapter
):
    model = new_model(speech_adapter=speech_adapter, quantize="nf4")
    before = {name: p.detach().clone() for name, p in model.core.named_parameters()}
    train_one_step(model, examples[:8])
    changed = {name for name, p in model.core.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.core.named_parameters() if p.requires_grad}
    assert all(".default" in name for name in changed) and len(changed) == 2 * 3 * 4 + 1
    expected = logits(model.eval(), examples[:1])
    models.save_trained(model, tmp_path / "epoch-1", SETTINGS)
    again = models.load_base(str(checkpoint), None, "float32", "sdpa", speech_adapter, "nf4")
    models.load_trained(again, tmp_path / "epoch-1", "lora")
    assert torch.equal(logits(again, examples[:1]), expected)
    rank = json.loads((tmp_path / "epoch-1" / "adapter_config.json").read_text())["r"]
    assert rank == (8 if speech_adapter == "continue" else 4)


def test_beside_quantised_weights_the_shipped_adapter_stays_active_frozen_and_without_dropout(
    new_model, checkpoint, examples, tmp_path
):
    """Merging would round it to 4 bits with the weights; the function must be that of the unquantised model, nearly."""
    model = new_model(quantize="nf4")
    speech = [p for name, p in model.core.named_parameters() if ".lora_" in name and ".speech." in name]
    assert len(speech) == 2 * 3 * 4 and not any(p.requires_grad for p in speech)
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    file = folder / models.SPEECH_ADAPTER / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5}))
    dropping = models.load_base(str(folder), None, "float32", "sdpa", "merge", "nf4")
    dropouts = [m for name, m in dropping.core.named_modules() if name.endswith("lora_dropout.speech")]
    assert len(dropouts) == 3 * 4 and all(getattr(m, "p", 0.0) == 0 for m in dropouts)  # 0 may be PyTorch's Identity
    near, without, exact = (
        logits(m.eval(), examples[:2]) for m in (model, new_model(speech_adapter="none", quantize="nf4"), new_model())
    )
    assert relative(near, exact) < 0.5 * relative(without, exact)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing read from disk is executed


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_an_adapter_or_a_model_is_not_executed(checkpoint, saved, tmp_path):
    payload = pickle.dumps({"weights": Payload(tmp_path / "executed")})
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(payload)
    speech = shutil.copytree(checkpoint, tmp_path / "speech")
    (speech / models.SPEECH_ADAPTER / "adapter_model.safetensors").unlink()
    (speech / models.SPEECH_ADAPTER / "adapter_model.bin").write_bytes(payload)
    for folder in (model, speech):
        with pytest.raises(cli.InputError, match="cannot be loaded"):
            models.load_base(str(folder), None, "float32", "sdpa", "merge")
    (saved / "adapter_model.safetensors").write_bytes(payload)
    with pytest.raises(cli.InputError, match="cannot be loaded"):
        reload(checkpoint, saved, "merge")
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(payload)
    with pytest.raises(cli.InputError, match="cannot be loaded"):
        reload(checkpoint, saved, "merge")
    assert not (tmp_path / "executed").exists()
