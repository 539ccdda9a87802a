from dataclasses import replace
from functools import partial
import json
from pathlib import Path
import pickle
import re
from typing import get_args

from bitsandbytes.nn import Linear4bit
from conftest import TRAINED, Payload, copy_of, fifo, greedy, sound
import numpy as np
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
import pytest
from safetensors.torch import load_file, save_file
import torch
from torch import nn
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

import data
import model as models
import prompts
from support import cli, pretrained
from support import run as runs
from support.sound import read_audio

SPEECH_ADAPTERS = get_args(runs.SpeechAdapter)
ALL = [(strategy, way, None) for strategy in models.STRATEGIES for way in SPEECH_ADAPTERS]
ALL += [("lora", way, "nf4") for way in SPEECH_ADAPTERS]


def load(folder, speech_adapter="none", quantize=None, attention="sdpa"):
    return models.load_base(pretrained.find(folder), "float32", attention, speech_adapter, quantize)


def loss_of(model, examples):
    batch = data.collate(examples, model.pad_id)
    return model.loss(batch, model.hear(batch.utterances))


def gradients(model, micro_batches):
    """Loss per supervised token, and the gradient of every trained parameter, as the training loop makes them."""
    supervised = sum(len(example.answer_ids) for micro_batch in micro_batches for example in micro_batch)
    model.zero_grad()
    total = 0.0
    for micro_batch in micro_batches:
        loss = loss_of(model, micro_batch) / supervised
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in models.trained_parameters(model).items()}


def train_one_step(model, examples, rate=1e-3):
    optimiser = torch.optim.AdamW(models.trained_parameters(model).values(), lr=rate, weight_decay=0.0)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        gradients(model, [examples])
        optimiser.step()


def score(model, utterances):
    questions = [models.question(model, utterance, "APA") for utterance in utterances]
    return models.score_distributions(model, questions, model.hear(utterances))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@torch.no_grad()
def read_at_once(model, examples, **labels):
    """transformers' own forward over a padded batch, logits at every position."""
    input_ids, lengths = data.collate(examples, model.pad_id).input_ids, torch.tensor([len(e) for e in examples])
    embeds = model.embed(torch.tensor(input_ids), model.hear([example.utterance for example in examples]))
    mask = (torch.arange(max(lengths)) < lengths[:, None]).long()
    return model.core(inputs_embeds=embeds, attention_mask=mask, **labels)


def logits(model, examples):
    return read_at_once(model, examples).logits


def from_ids_and_features(model, utterance, ids):
    """What transformers' own way takes for one utterance, without `embed` and `hear`."""
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "audio_input_features": data.log_mel(utterance, model.extractor)[None],
        "audio_embed_sizes": torch.tensor([utterance.audio_tokens]),
    }


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


def test_each_control_vector_has_the_gradient_of_its_tasks_loss(new_model, examples):
    model = new_model()
    change = torch.randn(model.control.shape, generator=torch.Generator().manual_seed(0))
    start = model.control.detach().clone()
    for row, task in enumerate(prompts.TASKS):
        batch = [example for example in examples[:8] if example.task == task]
        _, found = gradients(model, [batch])
        assert found["control"][row].norm() > 0 and found["control"][1 - row].norm() == 0
        losses = []
        for sign in (1, -1):
            model.control.data = start + sign * 2e-3 * change
            losses.append(gradients(model, [batch])[0])
        model.control.data = start
        assert (losses[0] - losses[1]) / 4e-3 == pytest.approx((found["control"] * change).sum().item(), rel=0.02)


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
    assert relative(found["control"], expected["control"]) < 0.2


# ----------------------------------------------------------------------------------------------------------------------
# Audio


def test_a_clips_embeddings_do_not_depend_on_its_batch_even_above_forty_seconds(new_model):
    model, rng = new_model(), np.random.default_rng(0)
    clips = [torch.tensor(rng.normal(8, 3, (frames, 80)), dtype=torch.float32) for frames in (50, 4100, 300, 9000)]
    with torch.no_grad():
        together = models.encode_audio(model.audio, clips)
        assert [len(embedding) for embedding in together] == [7, 513, 38, 1125]
        for features, embedding in zip(clips, together):
            assert relative(embedding, models.encode_audio(model.audio, [features])[0]) < 1e-5


@pytest.mark.parametrize("seconds", [3, 80])  # in chunks of 40 s; a shorter one is padded in transformers' way
def test_embeddings_of_one_clip_are_transformers_own(new_model, seconds):
    model, frames = new_model(), 100 * seconds
    features = torch.randn(frames, 80, generator=torch.Generator().manual_seed(0)) * 3 + 8
    tokens = -(-frames // data.FRAMES_PER_TOKEN)
    ids, nothing = torch.full((1, tokens), model.audio_id), torch.zeros(1, tokens, model.core.config.hidden_size)
    with torch.no_grad():
        theirs = model.audio(ids, nothing, features[None], audio_embed_sizes=torch.tensor([tokens]))
        assert relative(models.encode_audio(model.audio, [features])[0], theirs[0]) < 1e-5


def test_checkpointing_reaches_the_audio_encoder_where_it_trains(new_model, examples):
    exact, model = (torch.manual_seed(0) and new_model("unfreeze") for _ in range(2))
    model.core.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = []
    model.audio.encoder.encoders[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    (loss, found), (expected_loss, expected) = (gradients(m, [examples[:4:2]]) for m in (model, exact.train()))
    assert len(calls) == 2  # forward, and again for the backward pass
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in expected:  # those of a key's bias are zero but for rounding
        assert relative(found[name], expected[name]) < 1e-4 or "k_proj.bias" in name, name


def noting(seen, function):
    """The function, noting what it is given."""
    return lambda *given: seen.append(given) or function(*given)


@pytest.mark.parametrize(
    "strategy, fit, encoded, read",
    [
        ("lora", 3, [1] * 3, 3),  # each recording is heard once, and alone
        ("lora", 0, [1] * 12, 12),
        ("unfreeze", 3, [6, 6], 3),  # what trains hears a micro-batch together, again each time
    ],
)
def test_what_is_heard_is_kept_once_up_to_a_limit_and_losses_stay(
    new_model, examples, monkeypatch, strategy, fit, encoded, read
):
    """Two passes over three utterances with two tasks each, of which the limit lets the first `fit` be kept."""
    model, forgetful, calls = new_model(strategy), new_model(strategy), {"log_mel": [], "encode_audio": []}
    expected = loss_of(forgetful, examples[:6]).item()
    heard = [example.utterance for example in examples[: 2 * fit : 2]]
    made = forgetful.hear(heard) if strategy == "lora" else [data.log_mel(u, model.extractor) for u in heard]
    limit = sum(part.nbytes for part in made)
    for room, name in ((data, "log_mel"), (models, "encode_audio")):
        monkeypatch.setattr(room, name, noting(calls[name], getattr(room, name)))
    monkeypatch.setattr(models, "KEPT_AUDIO", limit)
    model.keep_audio = True
    assert [loss_of(model, examples[:6]).item() for _ in range(2)] == [expected] * 2
    assert ([len(features) for _, features in calls["encode_audio"]], len(calls["log_mel"])) == (encoded, read)
    assert sum(kept.nbytes for kept in model.kept.values()) == limit and forgetful.kept == {}


def test_a_batch_with_the_wrong_number_of_placeholders_is_refused(new_model, examples):
    model = new_model()
    (audio,) = model.hear([examples[0].utterance])
    with pytest.raises(ValueError, match="audio placeholders for"):
        model.loss(data.collate([examples[0]], model.pad_id), [audio[1:]])


def test_a_control_vector_starts_at_its_spare_row_or_if_that_is_nothing_the_users(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (matrix,) = (weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    model = load(folder)
    apa, mdd = model.control_ids
    assert torch.equal(model.control, matrix[[apa, mdd]])
    matrix[mdd] *= 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    user = model.tokenizer.convert_tokens_to_ids(prompts.USER)
    assert torch.equal(load(folder).control, matrix[[apa, user]])


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
    examples = data.make_examples(utterances[::10], model.tokenizer, model.audio_id)
    for _ in range(100):
        gradients(model, [examples])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    with torch.no_grad():  # as an export has them, for transformers' own way from ids
        model.core.get_input_embeddings().weight[model.control_ids] = model.control
    return model.requires_grad_(False).eval()


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
    questions = [models.question(fluent, u, task) for u in long_and_short for task in prompts.TASKS]
    by_task = sorted(questions, key=lambda question: question.task)

    def heard(batch):
        return batch, [audio[question.utterance.id] for question in batch]

    texts, expected = [], []
    for order, size in ((questions, 18), (questions, 5), (by_task, 3), (by_task, 1)):
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        answers = [answer for batch in batches for answer in models.generate(fluent, *heard(batch), 40)]
        texts.append({(q.utterance.id, q.task): answer for q, answer in zip(order, answers, strict=True)})
        scored = [[q for q in batch if q.task == "APA"] for batch in batches]
        distributions = torch.cat([models.score_distributions(fluent, *heard(batch)) for batch in scored if batch])
        expected.append((distributions * torch.arange(11.0)).sum(dim=-1))
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(set(texts[0].values())) > 4
    assert all((other - expected[0]).abs().max() < 1e-4 for other in expected[1:])
    assert expected[0].std(dim=0).min() > 0.01  # they differ between recordings, as they should


@pytest.mark.parametrize("task", prompts.TASKS)
def test_answers_are_those_of_transformers_own_generate(fluent, utterances, task):
    """One utterance at a time, from ids and features."""
    answers = greedy(fluent, utterances[:4], task, 25)
    for utterance, (text, length, truncated) in zip(utterances[:4], answers, strict=True):
        prompt = models.question(fluent, utterance, task).prompt_ids
        (sequence,) = fluent.core.generate(
            **from_ids_and_features(fluent, utterance, prompt),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=fluent.tokenizer.convert_tokens_to_ids(prompts.END),
        )
        written = sequence[len(prompt) :]
        assert fluent.tokenizer.decode(written) == text + prompts.END * (not truncated) and len(written) == length


def test_score_distributions_are_those_of_the_whole_answer_read_at_once(fluent, utterances):
    """Without a cache: transformers' own forward over prompt and answer, read where the scores stand."""
    before, values = data.encode_score_slots(fluent.tokenizer)
    places = torch.tensor([len(text) + 1 for text in before]).cumsum(dim=0) - 2
    for utterance, ours in zip(utterances, score(fluent, utterances[:3])):
        modes = [values[i] for i in ours.argmax(dim=-1)]
        answer = sum(([*text, value] for text, value in zip(before, modes)), [])
        prompt = models.question(fluent, utterance, "APA").prompt_ids
        read = fluent.core(**from_ids_and_features(fluent, utterance, prompt + answer)).logits[0]
        assert torch.allclose(ours, read[len(prompt) + places][:, values].softmax(dim=-1), atol=1e-5)


def test_expected_scores_are_compared_in_float32_where_the_weights_are_bfloat16(new_model, utterances):
    """In bfloat16 the likeliest two values are often equal."""
    model, hidden = new_model(dtype="bfloat16").eval(), []
    model.core.model.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state[:, -1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as on a GPU
        found = score(model, utterances[:2])
    head = model.core.lm_head.weight[data.encode_score_slots(model.tokenizer)[1]].double()
    expected = torch.stack([(state.double() @ head.T).softmax(dim=-1) for state in hidden], dim=1)
    assert found.shape == (2, 4, 11) and relative(found, expected) < 1e-5


def test_lines_of_predictions_hold_what_was_learnt_by_task_and_way_of_scoring(fluent, utterances):
    chosen = [*utterances[::10], replace(utterances[0], id="unscored", scores=None)]
    lines = models.answer(fluent, chosen, ("greedy", "expected"), 60)
    assert [(line["id"], line["task"]) for line in lines] == [(u.id, task) for u in chosen for task in u.tasks]
    greedy_scores = [prompts.parse_output("APA", line["output"]) for line in lines if line["task"] == "APA"]
    for line, utterance in zip(lines, [u for u in chosen for _ in u.tasks]):
        assert line["reference"] == data.reference(utterance, line["task"]) and line["speaker"] == utterance.speaker
        assert prompts.parse_output(line["task"], line["output"]) and line["tokens"] > 5 and not line["truncated"]
    likeliest = [line for line in models.answer(fluent, chosen, ("expected",), 60) if line["task"] == "APA"]
    assert [prompts.parse_output("APA", line["output"]) for line in likeliest] == greedy_scores
    for line, both in zip(likeliest, (line for line in lines if line["task"] == "APA"), strict=True):
        assert "tokens" not in line and np.allclose([*line["scores"].values()], [*both["scores"].values()], atol=1e-5)


@pytest.mark.parametrize("token, expected", [(prompts.END, ("", 1, False)), ("<|user|>", ("<|user|>" * 3, 3, True))])
def test_generation_stops_at_the_end_token_and_says_when_it_did_not(new_model, utterances, token, expected):
    model = new_model().eval()
    favourite = torch.zeros(model.core.config.vocab_size)
    favourite[model.tokenizer.convert_tokens_to_ids(token)] = 1
    model.core.lm_head.register_forward_hook(lambda head, hidden, out: favourite.expand(out.shape))
    assert greedy(model, utterances[:2], "MDD", 3) == [expected] * 2


def test_the_attention_setting_is_the_language_models_and_gives_the_same_logits(checkpoint, examples):
    sdpa, eager = (load(checkpoint, "merge", attention=name) for name in ("sdpa", "eager"))
    assert eager.core.config._attn_implementation == "eager"
    assert eager.audio.encoder.config._attn_implementation == "sdpa"
    assert torch.allclose(logits(sdpa, examples[:2]), logits(eager, examples[:2]), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("strategy, speech_adapter, quantize", ALL)
def test_a_step_changes_exactly_the_chosen_groups_and_they_come_back_as_they_were(
    new_model, checkpoint, examples, tmp_path, strategy, speech_adapter, quantize
):
    model, folder = new_model(strategy, speech_adapter, quantize=quantize), tmp_path / "epoch-1"
    before, untrained = {n: p.detach().clone() for n, p in model.named_parameters()}, logits(model.eval(), examples[:2])
    train_one_step(model.train(), examples[:8])
    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point()}  # 4 bits are packed anew
    changed = {name for name, p in weights.items() if not torch.equal(p, before[name])}
    patterns = [models.TRAINED[group] for group in models.STRATEGIES[strategy]]
    groups = [{name for name in changed if re.search(pattern, name)} for pattern in patterns]
    assert all(groups) and changed == set().union(*groups)
    assert not any("audio_embed" in name and "lora" in name for name in before)
    expected = logits(model.eval(), examples[:2])
    models.save_trained(model, folder, TRAINED | {"strategy": strategy})
    outside = load_file(folder / models.TRAINED_FILE)
    assert torch.equal(outside["control"], model.control) and (len(outside) == 1) == (strategy == "lora")
    again = load(checkpoint, speech_adapter, quantize)
    models.load_trained(again, folder, strategy)
    assert torch.equal(logits(again, examples[:2]), expected) and not torch.allclose(expected, untrained, atol=1e-3)
    assert json.loads((folder / "settings.json").read_text())["strategy"] == strategy
    asked = json.loads((folder / "prompts.json").read_text())
    assert asked == {task: prompts.build_prompt(task) for task in prompts.TASKS}


AUDIO = {"audio encoder": 441_254_144, "audio projector": 12_589_056}


@pytest.mark.parametrize(
    "strategy, rank, counts",
    [
        ("lora", 64, {"LoRA": 92_274_688, "control tokens": 2 * 3072}),
        ("unfreeze", 64, {"LoRA": 92_274_688, "control tokens": 2 * 3072, **AUDIO}),
    ],
)
def test_what_each_strategy_trains_at_full_size(strategy, rank, counts):
    model = nn.Module()
    with torch.device("meta"):
        network = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(num_attention_heads=24, tie_word_embeddings=True))
        model.network = get_peft_model(network, LoraConfig(r=rank, target_modules=models.LORA_TARGETS))
        model.control = nn.Parameter(torch.empty(2, 3072))
    assert models.set_trainable(model, strategy) == counts


def test_every_strategy_can_be_chosen_and_a_group_that_matches_nothing_is_an_error(new_model, monkeypatch):
    assert get_args(runs.Strategy) == tuple(models.STRATEGIES)
    monkeypatch.setitem(models.TRAINED, "audio encoder", "no_such_module")
    with pytest.raises(ValueError, match="'audio encoder'"):
        new_model("unfreeze")


def test_continue_trains_the_shipped_adapter_from_the_same_function_as_merge(new_model, checkpoint, examples):
    config = json.loads((checkpoint / pretrained.SPEECH_ADAPTER / "adapter_config.json").read_text())
    several = {way: new_model(speech_adapter=way, rank=4).eval() for way in SPEECH_ADAPTERS}
    assert several["continue"].network.peft_config["default"].r == config["r"] != 4
    shipped = load_file(checkpoint / pretrained.SPEECH_ADAPTER / pretrained.ADAPTER_FILE)
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
    before, control = {n: layer.get_delta_weight("default") for n, layer in layers.items()}, model.control.clone()
    assert models.moved(model) == (pytest.approx(0, abs=1e-7), 0)
    assert "next to nothing" in models.describe_moved(model)
    train_one_step(model, examples[:8])
    (adapter, vectors), shares = models.moved(model), []
    for name, layer in layers.items():
        weight = dequantize_module_weight(layer.get_base_layer())
        shares.append((layer.get_delta_weight("default") - before[name]).norm() / weight.norm())
    assert adapter == pytest.approx(torch.stack(shares).median().item(), rel=1e-3)
    by_row = [(model.control[i] - control[i]).norm().item() / control[i].norm().item() for i in (0, 1)]
    assert vectors == pytest.approx(sum(by_row) / 2, rel=1e-5)
    assert adapter > 1e-4 and "next to nothing" not in models.describe_moved(model)


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


def without_control(weights):
    return {name: weight for name, weight in weights.items() if name != "control"} or {"other": torch.zeros(1)}


ADAPTER, OUTSIDE, CONFIG = pretrained.ADAPTER_FILE, models.TRAINED_FILE, "adapter_config.json"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (ADAPTER, lambda file: change_weights(file, lambda w: {k: w[k] for k in [*w][1:]}), "1 keys differ"),
        (ADAPTER, lambda file: change_weights(file, lambda w: {k: v * float("nan") for k, v in w.items()}), "finite"),
        (ADAPTER, lambda file: file.write_bytes(pickle.dumps({"weights": Payload()})), "cannot be loaded"),
        (OUTSIDE, lambda file: change_weights(file, without_control), "2 keys differ"),
        (CONFIG, lambda file: change_json(file, r=2), "does not fit the model: .* is .*, not "),
        (CONFIG, lambda file: change_json(file, lora_alpha="many"), "cannot be loaded: "),
        (CONFIG, lambda file: change_json(file, lora_alpha=0), "r 4, lora_alpha 0: both must be above 0"),
        (CONFIG, lambda file: change_json(file, r=0), "r 0, lora_alpha 8: both must be above 0"),
        (ADAPTER, fifo, "is not a regular file"),
        (OUTSIDE, fifo, "is not a regular file"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_a_line_and_not_executed(checkpoint, saved, name, damage, message):
    damage(saved / name)
    with pytest.raises(cli.InputError, match=f"^[^\n]*{saved}[^\n]*{message}[^\n]*$"):
        models.load_trained(load(checkpoint), saved, "lora")
    assert not Path("executed").exists()


def test_the_feature_extractor_may_share_its_file_with_an_image_processor(checkpoint, tmp_path, utterances):
    folder = copy_of(checkpoint, tmp_path)
    image = {"image_processor_type": "Phi4MultimodalImageProcessorFast", "crop_size": 448, "image_mean": [0.5] * 3}
    change_json(folder / "preprocessor_config.json", **image, processor_class="Phi4MultimodalProcessor")
    ours, theirs = (data.log_mel(utterances[0], load(path).extractor) for path in (checkpoint, folder))
    assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# QLoRA


def test_nf4_is_for_the_language_models_layers_alone(new_model):
    model = new_model(quantize="nf4")
    quantised = {name: module for name, module in model.core.named_modules() if isinstance(module, Linear4bit)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    layers = {name.removesuffix(".base_layer") for name in quantised}
    assert layers == {f"model.layers.{i}.{part}" for i in range(3) for part in parts}
    others = model.core.get_input_embeddings(), model.audio.up_proj_for_speech, model.audio.encoder.embed.out
    assert {other.weight.dtype for other in others} == {torch.float32}
    layer = next(iter(quantised.values()))
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested and layer.weight.dtype == torch.uint8
    assert layer.compute_dtype == torch.bfloat16


def test_beside_quantised_weights_the_shipped_adapter_stays_active_and_frozen(
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
