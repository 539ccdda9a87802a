"""analysis.export: a checkpoint that stands alone answers as the adapter did; the cards' lines do what they say."""

import json
import re
import shutil

from conftest import TRAINED
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from analysis import export
import data
import evaluate
import model as models
import prompts
from support import cli, pretrained

TOKENS = 24  # of an answer; a model that was changed at random never ends one
# transformers' names and Microsoft's, as transformers' own conversion has them
NAMES = """
gate_up_proj net.0.linear, down_proj net.2, q_proj linear_q, k_proj linear_k, v_proj linear_v,
o_proj linear_out, up_proj_for_speech audio_projection.speech.0,
down_proj_for_speech audio_projection.speech.2, up_proj_for_vision_speech audio_projection.vision.0,
down_proj_for_vision_speech audio_projection.vision.2, img_projection_up img_projection.0,
img_projection_down img_projection.2, global_img_feature_extensor glb_GN, sub_img_feature_extensor sub_GN
"""
NAMES = dict(pair.split() for pair in NAMES.split(","))


@pytest.fixture
def train(new_model, checkpoint, corpus, tmp_path):
    """Makes the folder of an epoch whose trained weights were changed at random."""

    def make(strategy="lora", way="merge", **changes):
        settings = TRAINED | {"strategy": strategy, "speech_adapter": way, "model": str(checkpoint)} | changes
        settings |= {"data": str(corpus), "prompts": prompts.digest()}
        model = new_model(strategy, way, dtype=settings["dtype"], quantize=settings["quantize"])
        torch.manual_seed(0)
        for parameter in models.trained_parameters(model).values():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        often = model.tokenizer.convert_tokens_to_ids(["accuracy", "TH"])
        # as rows of the head, which is tied to the embedding, they would be written in the place of these words
        model.control.data = 4 * model.core.get_input_embeddings().weight.data[often].float()
        models.save_trained(model, tmp_path / "epoch-1", settings)
        return tmp_path / "epoch-1"

    return make


def exported(folder, adapter, **settings):
    said = export.export(export.Settings(folder=folder, adapter=adapter, **settings))
    return models.load_base(pretrained.find(folder), "float32", "sdpa", "none").eval(), said


def as_evaluated(adapter):
    asked = evaluate.ModelSettings(adapter=adapter)
    (evaluation,) = evaluate.evaluations(asked)
    return evaluate.load(evaluation, *evaluate.choose_model(evaluation, asked))


def answers(model, utterances):
    lines = models.answer(model, utterances, ("greedy", "expected"), TOKENS, True)
    scores = [values for line in lines if line["task"] == "APA" for values in line["scores"].values()]
    return [line["output"] for line in lines], torch.tensor(scores)


@pytest.mark.parametrize("strategy, way", [("lora", "merge"), ("lora", "continue"), ("unfreeze", "none")])
def test_an_exported_checkpoint_answers_as_the_adapter_did(train, checkpoint, corpus, tmp_path, strategy, way):
    adapter, utterances = train(strategy, way), data.read_corpus(corpus, "test", 8)
    texts, scores = answers(as_evaluated(adapter), utterances)
    bare = shutil.copytree(checkpoint, tmp_path / "bare")  # with names as transformers' converter gives them
    shipped = load_file(path := bare / "speech-lora/adapter_model.safetensors")
    save_file({name.removeprefix("base_model.model."): weight for name, weight in shipped.items()}, path)
    own_texts, own_scores = answers(exported(tmp_path / "new", adapter, model=str(bare))[0], utterances)
    assert own_texts == texts and len({*texts}) > 1
    torch.testing.assert_close(own_scores, scores, rtol=0, atol=1e-5)


def test_the_cards_lines_need_transformers_alone_and_give_the_same_answer(train, corpus, tmp_path):
    adapter, (utterance,) = train(), data.read_corpus(corpus, "test", 1)
    _, said = exported(tmp_path / "new", adapter)
    card = (tmp_path / "new/README.md").read_text()
    (tmp_path / "a.wav").write_bytes(utterance.recording())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    trained, own = as_evaluated(adapter), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert said in card and "was not measured" in card
    for task, text in zip(prompts.TASKS, answers(trained, [utterance])[0]):
        given = {"folder": str(tmp_path / "new"), "file": str(tmp_path / "a.wav")}
        exec(code.replace('["APA"]', f'["{task}"]').replace("=200", f"={TOKENS}"), given)
        prompt = json.loads((tmp_path / "new/prompts.json").read_text())[task]
        assert given["answer"] == re.sub(r"<\|\w+\|>", "", text) and prompt == prompts.build_prompt(task)
        assert own.encode(prompt) == trained.tokenizer.encode(prompt, add_special_tokens=False)  # whatever class it is


@pytest.mark.parametrize("way, quantize", [("continue", None), ("merge", None), ("merge", "nf4")])
def test_the_lines_beside_an_adapter_load_the_model_that_was_trained(train, corpus, way, quantize):
    folder = train("lora" if quantize else "unfreeze", way, quantize=quantize)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    given, utterances = {"FOLDER": folder}, data.read_corpus(corpus, "test", limit=2)
    exec(code, given)
    (texts, scores), (own_texts, own_scores) = (answers(m, utterances) for m in (as_evaluated(folder), given["model"]))
    assert own_texts == texts and torch.equal(own_scores, scores)


def test_the_card_names_hub_ids_alone_and_the_numbers_of_its_own_epoch(train, tmp_path):
    adapter = train()
    (evaluation,) = evaluate.evaluations(evaluate.ModelSettings(adapter=adapter))
    hub = {"model": "a/b", "revision": "c" * 40, "data": "d/e", "data_revision": "f" * 40}
    for label in ("epoch-1", "epoch-2"):
        numbers = {"evaluated": label, "utterances": 2, "per": 0.2, "per_low": 0.1, "per_high": 0.3}
        (adapter / "metrics.json").write_text(json.dumps(numbers))
        measured = export.scores(evaluation, adapter)
        assert ("| per | 0.200 | 0.100 to 0.300 |" in measured) == (label == "epoch-1") == ("not" not in measured)
    front = "base_model: a/b\ndatasets:\n- d/e\n---"
    assert front in export.card(evaluation.training.model_copy(update=hub), "x", measured, False)
    assert not re.search("base_model:|datasets:", export.card(evaluation.training, "x", measured, False))


def test_added_tokens_keep_their_ids_where_the_vocabulary_has_holes(checkpoint, tmp_path):
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|tag|>"] = 5000
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<|tag|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([*prompts.CONTROL_TOKENS.values()], special_tokens=True)
    export.write_tokenizer(tmp_path, tokenizer)
    own = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert own.get_vocab() == tokenizer.get_vocab() and own.get_vocab()["<|tag|>"] == 5000


@pytest.mark.parametrize(
    "held, dtype, quantize",
    [("bfloat16", "bfloat16", None), ("float32", "float32", "nf4")],
)
def test_a_folded_layer_is_what_training_held_with_what_was_learnt_rounded_once(train, tmp_path, held, dtype, quantize):
    adapter = train(dtype=held, quantize=quantize)
    _, said = exported(tmp_path / "new", adapter, dtype=dtype)
    weights, core = load_file(tmp_path / "new/model.safetensors"), as_evaluated(adapter).core
    layers = {name: module for name, module in core.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if quantize:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        expected = weight.float() + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        assert weights[f"{name}.weight"].equal(expected.to(getattr(torch, dtype)))
    assert len(layers) == 4 * len(core.model.layers) and ("takes 0.00%" in said) == (dtype == "float32")
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == dtype
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}


def test_what_was_not_written_here_is_kept_and_an_older_export_is_replaced(train, tmp_path):
    adapter, new = train(), tmp_path / "new"
    exported(new, adapter)
    (new / "model-00001-of-00002.safetensors").write_text("of an older one")
    exported(new, adapter)
    assert [path.name for path in new.glob("model*")] == ["model.safetensors"]
    (new / "README.md").write_text("mine")
    with pytest.raises(cli.InputError, match="choose another"):
        exported(new, adapter)
    assert (new / "README.md").read_text() == "mine"


def test_microsofts_layout_maps_there_and_back(train, checkpoint, tmp_path):
    adapter, like, new = train(), shutil.copytree(checkpoint, tmp_path / "like"), tmp_path / "new"
    exported(tmp_path / "ours", adapter)
    (like / "config.json").write_text('{"model_type": "phi4mm", "auto_map": {"AutoConfig": "c.Phi4MMConfig"}}')
    (like / "modeling_phi4mm.py").write_text("raise SystemExit")
    ours = load_file(tmp_path / "ours/model.safetensors")
    theirs = {name: name for name in ours}
    for name in theirs:
        if "_extend" in name and "img_processor" not in name:
            theirs[name] = ".".join(NAMES.get(part, part) for part in name.split("."))
    layers = {name for name in ours if re.fullmatch(rf"({models.LORA_TARGETS})\.weight", name)}
    listed = {theirs[name] for name in ours.keys() - layers} | {
        name.replace("weight", f"{part}.weight") for name in layers for part in ("base_layer", "lora_A.speech")
    }
    index = json.dumps({"weight_map": dict.fromkeys(listed, "model-00001-of-00001.safetensors")})
    (like / "model.safetensors.index.json").write_text(index)
    export.export(export.Settings(folder=new, adapter=adapter, like=like))
    found = load_file(new / "model.safetensors")
    assert found.keys() == {*theirs.values()} and all(found[theirs[name]].equal(ours[name]) for name in ours)
    assert (new / "modeling_phi4mm.py").exists() and not (new / "model.safetensors.index.json").exists()
    config = json.loads((new / "config.json").read_text())
    assert config["model_type"] == "phi4mm" and config["torch_dtype"] == "float32"
    assert prompts.CONTROL_TOKENS["APA"] in (new / "tokenizer.json").read_text()
    assert "No engine was run" in (new / "README.md").read_text()
    with pytest.raises(cli.InputError, match="1 weights are not those of this model, such as model.another"):
        export.check_names({*theirs.values(), "model.another"}, like)
