from dataclasses import replace
from functools import partial
import json
import os
from pathlib import Path
import pickle
import re
import shutil
from typing import get_args
from unittest.mock import Mock

from bitsandbytes.nn import Linear4bit
from conftest import ROOT, TRAINED, copy_of, fifo, greedy, sound, write_large_model
import numpy as np
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoTokenizer, Phi4MultimodalConfig, Phi4MultimodalForCausalLM

import data
import model as models
import prompts
from support import cli, memory, moved, pretrained, token_rows
from support import run as runs
from support.sound import read_audio

SPEECH_ADAPTERS = ("merge", "continue", "none")
# strategy and --speech-adapter: "full" has no LoRA, so there is none to continue
WAYS = [(s, way) for s in models.STRATEGIES for way in SPEECH_ADAPTERS if (s, way) != ("full", "continue")]


def load(folder, speech_adapter="none", quantize=None, attention="sdpa"):
    return models.load_base(str(folder), None, "float32", attention, speech_adapter, quantize)


def gradients(model, micro_batches):
    """Summed loss, and the gradient of every trained parameter, as the training loop makes them."""
    supervised = sum(len(example.answer_ids) for micro_batch in micro_batches for example in micro_batch)
    model.zero_grad()
    total = 0.0
    for micro_batch in micro_batches:
        loss = model(model.prepare(micro_batch)) / supervised
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in models.trained_parameters(model).items()}


def train_one_step(model, examples, rate=1e-3):
    optimiser = torch.optim.AdamW(models.trained_parameters(model).values(), lr=rate, weight_decay=0.0)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        gradients(model, [examples])
        optimiser.step()


def score(model, utterances):
    questions = [model.question(utterance, "APA") for utterance in utterances]
    return model.score_distributions(questions, model.hear(utterances))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def read_at_once(model, examples, **labels):
    """transformers' own forward over a padded batch, logits at every position."""
    batch, lengths = model.prepare(examples), torch.tensor([len(example) for example in examples])
    with torch.no_grad():
        audio = model.hear([example.utterance for example in examples])
        embeds = model._fill_in(torch.tensor(batch.input_ids), torch.tensor(batch.placeholders), audio)
        mask = (torch.arange(max(lengths)) < lengths[:, None]).long()
        return model.core(inputs_embeds=embeds, attention_mask=mask, **labels)


def logits(model, examples):
    return read_at_once(model, examples).logits


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def test_loss_and_gradients_do_not_depend_on_the_cut_into_micro_batches(new_model, examples):
    model, batch = new_model(), examples[:8]
    assert len({len(example) for example in batch}) > 2  # so there is padding
    loss, one = gradients(model, [batch])
    other_loss, eight = gradients(model, [[example] for example in batch])
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert one.keys() == eight.keys() and any(gradient.norm() > 0 for gradient in one.values())
    for name in one:
        assert relative(eight[name], one[name]) < 1e-5, name


def test_the_loss_equals_transformers_own_on_the_same_batch(new_model, examples):
    model, batch = new_model(), examples[:4]
    prepared = model.prepare(batch)
    labels = np.full(prepared.input_ids.shape, data.IGNORE)
    for row, example in zip(labels, batch):  # nothing of prompt and padding
        row[len(example.prompt_ids) : len(example)] = example.answer_ids
    theirs = read_at_once(model, batch, labels=torch.tensor(labels)).loss
    with torch.no_grad():
        ours = model(prepared) / sum(len(example.answer_ids) for example in batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_every_strategy_of_the_settings_says_what_trains():
    assert get_args(runs.Strategy) == tuple(models.STRATEGIES)


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
    assert all(gradient.isfinite().all() for gradient in found.values())
    tokens = next(name for name in found if "embed_tokens." in name)
    assert relative(found[tokens], expected[tokens]) < 0.2


# ----------------------------------------------------------------------------------------------------------------------
# Audio


def test_a_clip_has_the_same_embeddings_alone_and_batched_with_longer_ones_even_above_forty_seconds(new_model):
    model, rng, calls = new_model(), np.random.default_rng(0), []
    clips = [torch.tensor(rng.normal(8, 3, (frames, 80)), dtype=torch.float32) for frames in (50, 4100, 300, 9000)]
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.audio.encoder.encoders]
    with torch.no_grad():
        together = model.encode_audio(clips)
        assert [len(embedding) for embedding in together] == [7, 513, 38, 1125]
        assert len(calls) == len(hooks) == 2  # once a block: processes that share its weights wait at every call
        for features, embedding in zip(clips, together):
            assert relative(embedding, model.encode_audio([features])[0]) < 1e-5


def test_embeddings_of_one_clip_are_transformers_own(new_model, utterances):
    model, utterance = new_model(), utterances[0]
    features, tokens = data.log_mel(utterance, model.extractor), utterance.audio_tokens
    ids, nothing = torch.full((1, tokens), model.audio_id), torch.zeros(1, tokens, model.core.config.hidden_size)
    with torch.no_grad():
        theirs = model.audio(ids, nothing, features[None], audio_embed_sizes=torch.tensor([tokens]))
        assert relative(model.encode_audio([features])[0], theirs[0]) < 1e-5


@pytest.mark.parametrize("strategy", ["unfreeze", "full"])
def test_checkpointing_reaches_the_audio_encoder_where_it_trains(new_model, examples, strategy):
    exact, model = (torch.manual_seed(0) and new_model(strategy) for _ in range(2))
    model.core.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = []
    model.audio.encoder.encoders[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    (loss, found), (expected_loss, expected) = (gradients(m, [examples[:4:2]]) for m in (model, exact.train()))
    assert len(calls) == 2  # forward, and again for the backward pass
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in expected:  # those of a key's bias are zero but for rounding
        assert relative(found[name], expected[name]) < 1e-4 or "k_proj.bias" in name, name


def count_encoded(model, monkeypatch):
    """A list that gets the number of recordings of each call of the audio encoder."""
    calls, encode = [], model.encode_audio
    monkeypatch.setattr(model, "encode_audio", lambda features: calls.append(len(features)) or encode(features))
    return calls


def test_a_frozen_encoder_hears_each_recording_once_and_alone_whatever_runs_ask_for(
    new_model, examples, utterances, monkeypatch, tmp_path
):
    model, another_run, without = new_model(), new_model(), new_model()
    model.keep_audio(tmp_path)
    calls = count_encoded(model, monkeypatch)
    losses = [model(model.prepare(examples[:6])).item() for _ in range(2)]  # three utterances, two tasks each
    assert calls == [1] * 3 and losses[0] == losses[1]
    another_run.keep_audio(tmp_path)
    calls = count_encoded(another_run, monkeypatch)
    assert another_run(another_run.prepare(examples[:6])).item() == losses[0] and calls == []
    for kept, alone in zip(model.hear(utterances[:6]), (without.hear([u])[0] for u in utterances[:6]), strict=True):
        assert torch.equal(kept, alone)


def test_an_encoder_that_trains_hears_a_micro_batch_together_and_nothing_is_kept(
    new_model, examples, monkeypatch, tmp_path
):
    model = new_model("unfreeze")
    model.keep_audio(tmp_path)
    calls = count_encoded(model, monkeypatch)
    for _ in range(2):
        model(model.prepare(examples[:6]))
    assert calls == [6, 6] and list(tmp_path.iterdir()) == []


def test_embeddings_of_other_weights_or_another_type_are_never_used(new_model, utterances, tmp_path):
    several = model, other, half = new_model(), new_model(), new_model(dtype="bfloat16")
    other.audio.down_proj_for_speech.bias.data[0] += 1
    for one in several:
        one.keep_audio(tmp_path)
    found = [one.hear(utterances[:1])[0] for one in several]
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(found[0], found[1]) and found[2].dtype == torch.bfloat16
    assert all(torch.equal(one.hear(utterances[:1])[0], before) for one, before in zip(several, found))


def test_a_batch_with_the_wrong_number_of_placeholders_is_refused(new_model, examples):
    model = new_model()
    (audio,) = model.hear([examples[0].utterance])
    with pytest.raises(ValueError, match="audio placeholders for"):
        model.loss(model.prepare([examples[0]]), [audio[1:]])


# ----------------------------------------------------------------------------------------------------------------------
# Rows of the control tokens


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
def test_trained_rows_enter_loss_and_gradient_as_in_pefts_own_layers_without_a_copy_of_the_matrix(
    new_model, examples, monkeypatch, dtype
):
    """PEFT puts the trained rows into a copy of the matrix, for the embedding and for the head tied to it."""
    model = new_model(dtype=dtype)
    matrix = model.core.get_input_embeddings().token_adapter.base_layer.weight
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    rows.data += torch.randn_like(rows)
    batch, made = model.prepare(examples[:4]), {}
    audio = model.embed_recordings(batch.recordings)
    for whose in ("ours", "PEFT's"):
        if whose == "PEFT's":
            monkeypatch.setattr(token_rows, "rows_of", lambda layer, tokens: layer(tokens))
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
        token_rows.merge(model)
    with Allocated(model.core.get_input_embeddings().token_adapter.base_layer.weight) as made:
        greedy(model, utterances[:2], "APA", 3)
        score(model, utterances[:2])
    assert made.bytes == 0


def test_a_spare_row_that_is_next_to_nothing_starts_from_the_users(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (matrix,) = (weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    as_it_is = load(folder)
    apa, mdd = models.control_token_ids(as_it_is.tokenizer)
    assert as_it_is.started_rows == []
    assert torch.equal(as_it_is.core.get_input_embeddings().weight[[apa, mdd]], matrix[[apa, mdd]])
    matrix[mdd] *= 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = load(folder)
    rows, user = model.core.get_input_embeddings().weight, model.tokenizer.convert_tokens_to_ids(prompts.USER)
    assert model.started_rows == [prompts.CONTROL_TOKENS["MDD"]]
    assert torch.equal(rows[mdd], rows[user]) and torch.equal(rows[apa], matrix[apa])
    assert torch.equal(model.core.lm_head.weight[mdd], rows[user])


# ----------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.fixture(scope="module")
def fluent(checkpoint, utterances):
    """A model that has learnt enough of a few utterances to write different answers."""
    model = load(checkpoint, "merge")
    models.add_adapter(model, 16, 32, 0.0)
    models.set_trainable(model, "unfreeze")
    model.core.model.layers.requires_grad_(True)  # all of them, so that it is quick
    parameters = models.trained_parameters(model).values()
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    examples = list(data.Examples(utterances[::10], model.tokenizer, model.audio_id))
    for _ in range(100):
        gradients(model, [examples])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def long_and_short(utterances):
    """Recordings as long as the real corpus' are."""
    seconds = (1.2, 20.4, 3.5, 2.1, 8.1, 3.4, 5.0, 1.9, 2.7)  # with its shortest, longest, median, 95th percentile
    found = []
    for utterance, length in zip([*utterances[::5], utterances[1]], seconds):
        wave = np.resize(read_audio(utterance.recording), int(length * data.SAMPLE_RATE))
        found.append(replace(utterance, recording=partial(bytes, sound(wave)), samples=len(wave)))
    return found


def test_texts_and_expected_scores_do_not_depend_on_the_batch(fluent, long_and_short):
    """Neither on its size, nor on whether it holds both tasks."""
    audio = dict(zip((u.id for u in long_and_short), fluent.hear(long_and_short)))
    questions = [fluent.question(u, task) for u in long_and_short for task in prompts.TASKS]
    by_task = sorted(questions, key=lambda question: question.task)

    def heard(batch):
        return batch, [audio[question.utterance.id] for question in batch]

    texts, expected = [], []
    for order, size in ((questions, 18), (questions, 5), (by_task, 3), (by_task, 1)):
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        answers = [answer for batch in batches for answer in fluent.generate(*heard(batch), 40)]
        texts.append({(q.utterance.id, q.task): answer for q, answer in zip(order, answers, strict=True)})
        scored = [[q for q in batch if q.task == "APA"] for batch in batches]
        distributions = torch.cat([fluent.score_distributions(*heard(batch)) for batch in scored if batch])
        expected.append((distributions * torch.arange(11.0)).sum(dim=-1))
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(set(texts[0].values())) > 4
    assert all((other - expected[0]).abs().max() < 1e-4 for other in expected[1:])
    assert expected[0].std(dim=0).min() > 0.01  # they differ between recordings, as they should


@pytest.mark.parametrize("task", prompts.TASKS)
def test_answers_are_those_of_transformers_own_generate(fluent, utterances, task):
    """One utterance at a time, from ids and features, with its cache."""
    answers = greedy(fluent, utterances[:4], task, 25)
    for utterance, (text, length, truncated) in zip(utterances[:4], answers, strict=True):
        input_ids = torch.tensor([fluent.question(utterance, task).prompt_ids])
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


def test_score_distributions_are_those_of_the_whole_answer_read_at_once(fluent, utterances):
    """Without a cache: transformers' own forward over prompt and answer, read where the scores stand."""
    distributions = score(fluent, utterances[:3])
    before, values = data.encode_score_slots(fluent.tokenizer)
    places = torch.tensor([len(text) + 1 for text in before]).cumsum(dim=0) - 2
    for utterance, ours in zip(utterances, distributions):
        modes = [values[i] for i in ours.argmax(dim=-1)]
        answer = sum(([*text, value] for text, value in zip(before, modes)), [])
        example = replace(fluent.question(utterance, "APA"), answer_ids=answer)
        scores = logits(fluent, [example])[0][len(example.prompt_ids) + places]
        assert torch.allclose(ours, scores[:, values].softmax(dim=-1), atol=1e-5)


def test_lines_of_predictions_hold_what_was_learnt_by_heart_by_task_and_way_of_scoring(fluent, utterances):
    chosen = [*utterances[::10], replace(utterances[0], id="unscored", scores=None)]
    lines = fluent.answer(chosen, ("greedy", "expected"), 60)
    assert [(line["id"], line["task"]) for line in lines] == [(u.id, task) for u in chosen for task in u.tasks]
    greedy_scores = [prompts.parse_output("APA", line["output"]) for line in lines if line["task"] == "APA"]
    for line, utterance in zip(lines, [u for u in chosen for _ in u.tasks]):
        assert line["reference"] == data.reference(utterance, line["task"]) and line["speaker"] == utterance.speaker
        assert prompts.parse_output(line["task"], line["output"]) and line["tokens"] > 5 and not line["truncated"]
    likeliest = [line for line in fluent.answer(chosen, ("expected",), 60) if line["task"] == "APA"]
    assert [prompts.parse_output("APA", line["output"]) for line in likeliest] == greedy_scores
    for line, both in zip(likeliest, (line for line in lines if line["task"] == "APA"), strict=True):
        assert "tokens" not in line and np.allclose([*line["scores"].values()], [*both["scores"].values()], atol=1e-5)


@pytest.mark.parametrize("token, expected", [(prompts.END, ("", 1, False)), ("<|user|>", ("<|user|>" * 3, 3, True))])
def test_generation_stops_at_the_end_token_and_says_when_it_did_not(new_model, utterances, token, expected):
    model = new_model().eval()
    favourite = torch.zeros(model.core.config.vocab_size)
    favourite[model.tokenizer.convert_tokens_to_ids(token)] = 1
    model._logits = lambda hidden: favourite.expand(len(hidden), -1)
    assert greedy(model, utterances[:2], "MDD", 3) == [expected] * 2


def test_what_is_compared_is_computed_in_float32_where_the_weights_are_bfloat16(new_model):
    """Hidden states whose two likeliest tokens are often equal in bfloat16."""
    model = new_model(dtype="bfloat16")
    weight = model.core.lm_head.token_adapter.base_layer.weight
    hidden = 20 * torch.randn(4000, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = hidden.double() @ weight.double().T  # (4000, V)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = torch.arange(11).expand(len(hidden), -1)
        exact, rounded = model._exact_logits(hidden, tokens), model._logits(hidden)
        assert model._likeliest(hidden).tolist() == expected.argmax(dim=1).tolist()
    assert rounded.argmax(dim=1).tolist() != expected.argmax(dim=1).tolist()
    assert exact.dtype == torch.float32 and relative(exact, expected[:, :11]) < 1e-5 < relative(rounded, expected)


def test_the_attention_setting_is_the_language_models_and_gives_the_same_logits(checkpoint, examples):
    sdpa, eager = (load(checkpoint, "merge", attention=name) for name in ("sdpa", "eager"))
    assert eager.core.config._attn_implementation == "eager"
    assert eager.audio.encoder.config._attn_implementation == "sdpa"
    assert torch.allclose(logits(sdpa, examples[:2]), logits(eager, examples[:2]), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("strategy, speech_adapter", WAYS)
def test_a_step_changes_exactly_the_chosen_groups_and_a_reloaded_adapter_gives_the_same_logits(
    new_model, checkpoint, examples, tmp_path, strategy, speech_adapter
):
    model, folder = new_model(strategy, speech_adapter), tmp_path / "epoch-1"
    before = {name: p.detach().clone() for name, p in model.core.named_parameters()}
    rows, untrained = model.core.get_input_embeddings().weight.detach().clone(), logits(model.eval(), examples[:1])
    train_one_step(model, examples[:8])
    changed = {name for name, p in model.core.named_parameters() if not torch.equal(p, before[name])}
    patterns = [models.PARAMETER_GROUPS[group] for group in models.STRATEGIES[strategy]]
    groups = [{name for name in changed if re.search(pattern, name)} for pattern in patterns]
    assert all(groups) and changed == set().union(*groups)
    assert not any("audio_embed" in name and "lora" in name for name in before)
    if strategy != "full":  # of the embedding only the rows of the control tokens
        moved_rows = (model.core.get_input_embeddings().weight != rows).any(dim=1)
        assert torch.nonzero(moved_rows).flatten().tolist() == models.control_token_ids(model.tokenizer)
    expected = logits(model.eval(), examples[:1])
    models.save_trained(model, folder, TRAINED | {"strategy": strategy})
    again = load(checkpoint, speech_adapter)
    models.load_trained(again, folder, strategy)
    assert torch.equal(logits(again, examples[:1]), expected) and not torch.allclose(expected, untrained, atol=1e-3)
    assert json.loads((folder / "settings.json").read_text())["strategy"] == strategy
    assert (folder / models.TRAINED_FILE).exists() == (strategy != "lora")


LANGUAGE_MODEL, ENCODER, PROJECTOR = 3_836_021_760, 441_254_144, 12_589_056
AUDIO = {"audio encoder": ENCODER, "audio projector": PROJECTOR}


def full_size(strategy, rank=None):
    """The real architecture with what a strategy trains, on the meta device, and the counts of what trains."""
    with torch.device("meta"):
        network = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(num_attention_heads=24, tie_word_embeddings=True))
        model = models.SpeechModel(network, None, None)
        if strategy != "full":
            tokens = {"embed_tokens": [200029, 200030]}
            config = LoraConfig(r=rank, target_modules=models.LORA_TARGETS, trainable_token_indices=tokens)
            model.network = get_peft_model(network, config)
    return model, models.set_trainable(model, strategy)


@pytest.mark.parametrize(
    "strategy, rank, counts",
    [
        ("lora", 64, {"LoRA": 92_274_688, "control tokens": 2 * 3072}),
        ("lora", 320, {"LoRA": 461_373_440, "control tokens": 2 * 3072}),  # the shipped speech adapter's rank
        ("unfreeze", 64, {"LoRA": 92_274_688, "control tokens": 2 * 3072, **AUDIO}),
        ("full", None, {"language model": LANGUAGE_MODEL, **AUDIO}),
    ],
)
def test_what_each_strategy_trains_at_full_size(strategy, rank, counts):
    model, found = full_size(strategy, rank)
    assert found == counts
    adapted = [name for name, module in model.core.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == (0 if strategy == "full" else 32 * 4)
    assert all(name.startswith("model.layers.") for name in adapted)
    page = (ROOT / "docs" / "running.md").read_text()
    assert f"{sum(counts.values()):,}" in page and f"{sum(p.numel() for p in model.core.parameters()):,}" in page


def test_the_memory_that_full_takes_is_counted_and_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    model, counts = full_size("full")
    trained, total = sum(counts.values()), sum(parameter.numel() for parameter in model.parameters())
    expected = 18 * trained + 2 * (total - trained)
    groups = [models.PARAMETER_GROUPS[group] for group in models.STRATEGIES["full"]]
    assert sum(memory.of_full(model.core, groups).values()) == expected == 78_125_847_424
    Phi4MultimodalConfig(num_attention_heads=24, tie_word_embeddings=True).save_pretrained(tmp_path)
    gpu = Mock(total_memory=expected)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    memory.check_full(tmp_path, None, groups)
    gpu.total_memory -= 1
    with pytest.raises(cli.InputError, match=r"78\.1 GB .*the GPU has 78\.1.*--shard"):
        memory.check_full(tmp_path, None, groups)


def test_a_group_that_matches_nothing_is_an_error(new_model, monkeypatch):
    monkeypatch.setitem(models.PARAMETER_GROUPS, "audio encoder", "no_such_module")
    with pytest.raises(ValueError, match="'audio encoder'"):
        new_model("unfreeze")


def test_continue_trains_the_shipped_adapter_and_starts_from_the_same_function_as_merge(
    new_model, checkpoint, examples
):
    config = json.loads((checkpoint / pretrained.SPEECH_ADAPTER / "adapter_config.json").read_text())
    several = {way: new_model(speech_adapter=way, rank=4).eval() for way in SPEECH_ADAPTERS}
    assert several["continue"].network.peft_config["default"].r == config["r"] != 4
    shipped = load_file(checkpoint / pretrained.SPEECH_ADAPTER / models.ADAPTER_FILE)
    ours = get_peft_model_state_dict(several["continue"].network)
    assert all(torch.equal(ours[key], value) for key, value in shipped.items())
    outputs = {way: logits(model, examples[:2]) for way, model in several.items()}
    assert torch.allclose(outputs["merge"], outputs["continue"], atol=1e-4)
    assert not torch.allclose(outputs["merge"], outputs["none"], atol=1e-2)


@pytest.mark.parametrize("speech_adapter", SPEECH_ADAPTERS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_has_moved_is_measured_from_where_training_began(new_model, examples, speech_adapter, quantize):
    model = new_model(speech_adapter=speech_adapter, quantize=quantize)
    layers = {name: layer for name, layer in model.core.named_modules() if isinstance(layer, LoraLayer)}
    before = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    assert model.moved() == {"adapter_moved": pytest.approx(0, abs=1e-7), "control_tokens_moved": 0}
    assert "next to nothing" in moved.describe(model.moved())
    train_one_step(model, examples[:8])
    found, shares = model.moved(), []
    for name, layer in layers.items():
        weight = dequantize_module_weight(layer.get_base_layer())
        shares.append((layer.get_delta_weight("default") - before[name]).norm() / weight.norm())
    assert found["adapter_moved"] == pytest.approx(torch.stack(shares).median().item(), rel=1e-3)
    assert found["adapter_moved"] > 1e-4 and found["control_tokens_moved"] > 1e-4
    assert "next to nothing" not in moved.describe(found)


def test_a_model_without_an_adapter_has_not_moved(new_model):
    assert new_model("full").moved() == {}


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.fixture
def saved(new_model, tmp_path):
    models.save_trained(new_model(), tmp_path / "adapter", TRAINED)
    return tmp_path / "adapter"


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path, change):
    weights = load_file(path)
    save_file(change(weights) or weights, path, {"format": "pt"})


class Payload:
    """Unpickling this makes a file: what comes from elsewhere could as well do anything else."""

    def __reduce__(self):
        return Path.touch, (Path("executed").absolute(),)


FOREIGN = {"base_model.model.model.layers.9.lora_A.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: change_weights(file, lambda w: {k: w[k] for k in [*w][1:]}), "1 keys differ"),
        (lambda file: change_weights(file, lambda w: w | FOREIGN), "1 keys differ"),
        (lambda file: change_weights(file, lambda w: {k: v * float("nan") for k, v in w.items()}), "not finite"),
        (lambda file: change_weights(file, lambda w: {k: v.long() for k, v in w.items()}), "not finite"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "cannot be loaded"),
        (lambda file: file.write_bytes(pickle.dumps({"weights": Payload()})), "cannot be loaded"),
        (lambda file: file.rename(file.with_suffix(".bin")), "missing"),
        (fifo, "is missing, or is not a regular file"),
    ],
)
def test_weights_that_are_not_an_adapters_are_refused_and_nothing_is_executed(checkpoint, saved, damage, message):
    damage(saved / models.ADAPTER_FILE)
    with pytest.raises(cli.InputError, match=f"adapter {saved}.*{message}"):
        models.load_trained(load(checkpoint), saved, "lora")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 2}, "does not fit the model: .* is .*, not "),
        ({"trainable_token_indices": None}, "control tokens"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": 1e300}, "lora_alpha 1e.300"),
        ({"r": True}, "r True"),
        ({"use_rslora": "no"}, "use_rslora 'no'"),
        ({"fan_in_fan_out": "x"}, "fan_in_fan_out 'x'"),
        ({"alpha_pattern": {"qkv_proj": -1}}, "alpha_pattern .*'qkv_proj'"),
        ({"target_parameters": ["x"]}, "target_parameters .*'x'"),
    ],
)
def test_an_adapters_configuration_that_does_not_fit_is_named(checkpoint, saved, change, message):
    change_json(saved / "adapter_config.json", **change)
    with pytest.raises(cli.InputError, match=message):
        models.load_trained(load(checkpoint), saved, "lora")


def test_saving_again_replaces_the_folder_but_none_with_something_that_was_not_written_here(new_model, saved):
    before = (saved / models.ADAPTER_FILE).read_bytes()
    models.save_trained(new_model(), saved, TRAINED)
    second = (saved / models.ADAPTER_FILE).read_bytes()
    (saved / "mine").write_text("kept")
    with pytest.raises(cli.RunError, match=f"{saved} .*mine.*move it away"):
        models.save_trained(new_model(), saved, TRAINED)
    assert (saved / "mine").read_text() == "kept"
    assert (saved / models.ADAPTER_FILE).read_bytes() == second != before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_text_is_split_as_tokenizer_json_says_whatever_class_the_checkpoint_names(checkpoint, tmp_path):
    """Reported of the real one: it names GPT2TokenizerFast, a class that has its own way to split."""
    folder = copy_of(checkpoint, tmp_path)
    before = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"] | {"use_regex": False}
    pattern = {"Regex": r"\p{N}|\p{L}+|\s+|[^\s\p{L}\p{N}]"}
    digits = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    change_json(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, before]})
    change_json(folder / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast")
    text = prompts.mdd_target("WE SEE 10", ["W", "IY"])
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert load(folder).tokenizer.encode(text) == expected != AutoTokenizer.from_pretrained(folder).encode(text)


def test_the_feature_extractor_shares_its_file_with_the_real_checkpoints_image_processor(
    checkpoint, tmp_path, utterances
):
    folder = copy_of(checkpoint, tmp_path)
    image = {"image_processor_type": "Phi4MultimodalImageProcessorFast", "crop_size": 448, "image_mean": [0.5] * 3}
    change_json(folder / "preprocessor_config.json", **image, processor_class="Phi4MultimodalProcessor")
    ours, theirs = (data.log_mel(utterances[0], load(path).extractor) for path in (checkpoint, folder))
    assert torch.equal(ours, theirs)


def lose_user_token(folder):
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    kept = [token for token in tokens if token["content"] != prompts.USER]
    change_json(folder / "tokenizer.json", added_tokens=kept)


def pickled(name):
    def damage(folder):
        (folder / f"{name}model.safetensors").unlink()
        (folder / (f"{name}model.bin" if name else "pytorch_model.bin")).write_bytes(pickle.dumps(Payload()))

    return damage


def changed(name, **values):
    return lambda folder: change_json(folder / f"{name}.json", **values)


@pytest.mark.parametrize(
    "damage, message",
    [
        (changed("config", model_type="llama"), "config.json: model_type 'llama'"),
        (changed("config", num_hidden_layers=10**6), "config.json: num_hidden_layers 1000000"),
        (changed("config", pad_token_id=None), "config.json: pad_token_id None"),
        (changed("config", pad_token_id=10**9), "config.json: .*token 1000000000 has no row"),
        (changed("config", audio_config={"audio_token_id": 10**9}), "config.json: .*token 1000000000 has no row"),
        (changed("config", audio_config={"audio_token_id": -1}), "config.json: audio_config.audio_token_id -1"),
        (changed("config", sliding_window=-1), "config.json: sliding_window -1"),
        (changed("preprocessor_config", hop_length=80), "preprocessor_config.json: hop_length 80: .*160"),
        (changed("preprocessor_config", sampling_rate="x"), "preprocessor_config.json: sampling_rate 'x'"),
        (changed("preprocessor_config", feature_size=7), "preprocessor_config.json: feature_size 7"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no end-of-text token: tokenizer_config.json"),
        (
            lambda folder: shutil.rmtree(folder / pretrained.SPEECH_ADAPTER),
            "copy has no speech-lora/.*--speech-adapter none",
        ),
        (lose_user_token, r"no token <\|user\|>"),
        (pickled(""), "cannot be loaded"),
        (pickled(f"{pretrained.SPEECH_ADAPTER}/adapter_"), "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_with_what_is_wrong(checkpoint, tmp_path, damage, message):
    folder = copy_of(checkpoint, tmp_path)
    damage(folder)
    with pytest.raises(cli.InputError, match=f"^.*{message}.*$") as error:
        pretrained.check(str(folder), None, "merge")
        load(folder, "merge")
    assert "\n" not in str(error.value) and not os.path.exists("executed")


def test_a_large_model_without_a_gpu_stops_with_the_two_ways_on(tmp_path):
    write_large_model(tmp_path / "large")
    with pytest.raises(cli.InputError, match="^.*needs a CUDA GPU.*python tiny.py.*$"):
        pretrained.check(tmp_path / "large", None, "none")


@pytest.mark.filterwarnings("error:The PEFT config")
def test_adapters_of_a_model_that_was_elsewhere_load_without_a_warning(new_model, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    shipped, trained = folder / pretrained.SPEECH_ADAPTER / "adapter_config.json", tmp_path / "epoch-1"
    change_json(shipped, base_model_name_or_path="elsewhere")
    models.save_trained(new_model(), trained, TRAINED)
    change_json(trained / "adapter_config.json", base_model_name_or_path="elsewhere")
    model = load(folder, "merge")
    models.load_trained(model, trained, "lora")

    assert model.network.peft_config["default"].base_model_name_or_path == str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# QLoRA


@pytest.mark.parametrize("speech_adapter", SPEECH_ADAPTERS)
def test_nf4_is_for_the_language_models_layers_alone(new_model, speech_adapter):
    model = new_model(speech_adapter=speech_adapter, quantize="nf4")
    quantised = {name: module for name, module in model.core.named_modules() if isinstance(module, Linear4bit)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    layers = {name.removesuffix(".base_layer") for name in quantised}
    assert layers == {f"model.layers.{i}.{part}" for i in range(3) for part in parts}
    others = model.core.get_input_embeddings(), model.audio.up_proj_for_speech, model.audio.encoder.embed.out
    assert {other.weight.dtype for other in others} == {torch.float32}
    layer = next(iter(quantised.values()))
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested and layer.weight.dtype == torch.uint8
    assert layer.compute_dtype == torch.bfloat16


def test_a_skip_list_that_looks_right_is_found_out(monkeypatch, checkpoint):
    """Without "model." before it, the name keeps nothing of the audio path from being quantised."""
    wrong = pretrained.nf4()
    wrong.llm_int8_skip_modules = ["embed_tokens_extend", "lm_head"]
    monkeypatch.setattr(four_bits, "nf4", lambda: wrong)
    with pytest.raises(ValueError, match="embed_tokens_extend.* is a Linear4bit"):
        load(checkpoint, quantize="nf4")


@pytest.mark.parametrize("speech_adapter", SPEECH_ADAPTERS)
def test_qlora_trains_the_adapter_alone_and_comes_back_as_it_was(
    new_model, checkpoint, examples, tmp_path, speech_adapter
):
    model = new_model(speech_adapter=speech_adapter, quantize="nf4")
    before = {name: p.detach().clone() for name, p in model.core.named_parameters()}
    train_one_step(model, examples[:8])
    changed = {name for name, p in model.core.named_parameters() if not torch.equal(p, before[name])}
    assert changed == models.trained_parameters(model).keys()
    assert all(".default" in name for name in changed) and len(changed) == 2 * 3 * 4 + 1
    expected = logits(model.eval(), examples[:1])
    models.save_trained(model, tmp_path / "epoch-1", TRAINED)
    again = load(checkpoint, speech_adapter, "nf4")
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
    folder = copy_of(checkpoint, tmp_path)
    change_json(folder / pretrained.SPEECH_ADAPTER / "adapter_config.json", lora_dropout=0.5)
    layers = load(folder, "merge", "nf4").core.named_modules()
    dropouts = [m for name, m in layers if name.endswith("lora_dropout.speech")]
    assert len(dropouts) == 3 * 4 and all(getattr(m, "p", 0.0) == 0 for m in dropouts)  # 0 may be PyTorch's Identity
    others = new_model(speech_adapter="none", quantize="nf4"), new_model()
    near, without, exact = (logits(m.eval(), examples[:2]) for m in (model, *others))
    assert relative(near, exact) < 0.5 * relative(without, exact)
