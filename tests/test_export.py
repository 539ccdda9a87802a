"""analysis.export: a checkpoint that stands alone answers as the adapter did; a card and a guard beside an adapter."""

import json
import re
import shutil

from conftest import TRAINED
from peft import PeftModel
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoTokenizer, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

from analysis import export
import data
import model as models
import prompts
from support import cards, cli, run_folder

WAYS = [(s, w) for s in models.STRATEGIES for w in ("merge", "continue", "none") if (s, w) != ("full", "continue")]
TOKENS = 24  # of an answer; a model that was changed at random never ends one
# From Microsoft's names to transformers', as its own conversion has them
THEIRS = {
    ".net.0.linear": ".gate_up_proj",
    ".net.2": ".down_proj",
    ".linear_q": ".q_proj",
    ".linear_k": ".k_proj",
    ".linear_v": ".v_proj",
    ".linear_out": ".o_proj",
    ".audio_projection.speech.0": ".up_proj_for_speech",
    ".audio_projection.speech.2": ".down_proj_for_speech",
    ".audio_projection.vision.0": ".up_proj_for_vision_speech",
    ".audio_projection.vision.2": ".down_proj_for_vision_speech",
    ".img_projection.0": ".img_projection_up",
    ".img_projection.2": ".img_projection_down",
    ".glb_GN": ".global_img_feature_extensor",
    ".sub_GN": ".sub_img_feature_extensor",
}


def train(make, checkpoint, corpus, folder, strategy="lora", way="merge", **changes):
    """The folder of an epoch whose trained weights were changed at random; returns train.py's settings too."""
    settings = TRAINED | {"strategy": strategy, "speech_adapter": way, "model": str(checkpoint), "data": str(corpus)}
    settings |= changes
    model = make(strategy, way, dtype=settings["dtype"], quantize=settings["quantize"])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in models.trained_parameters(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models.save_trained(model, folder, settings)
    return settings


def exported(folder, adapter, **settings):
    said = export.export(export.Settings(folder=folder, adapter=adapter, **settings))
    return models.load_base(str(folder), None, "float32", "sdpa", "none"), said


def as_evaluated(checkpoint, adapter):
    (folder, training), *_ = run_folder.adapters(adapter, None)
    model = models.load_base(str(checkpoint), None, training.dtype, "sdpa", training.speech_adapter, training.quantize)
    models.load_trained(model, folder, training.strategy)
    return model.eval()


def answers(model, utterances):
    lines = model.answer(utterances, ("greedy", "expected"), TOKENS, True)
    scores = [values for line in lines if line["task"] == "APA" for values in line["scores"].values()]
    return [line["output"] for line in lines], torch.tensor(scores)


@pytest.fixture
def adapter(new_model, checkpoint, corpus, tmp_path):
    train(new_model, checkpoint, corpus, tmp_path / "epoch-1")
    return tmp_path / "epoch-1"


@pytest.mark.parametrize("strategy, way", WAYS)
def test_an_exported_checkpoint_answers_as_the_adapter_did(new_model, checkpoint, corpus, tmp_path, strategy, way):
    train(new_model, checkpoint, corpus, tmp_path / "epoch-1", strategy, way)
    utterances = data.read_corpus(corpus, "test")
    texts, scores = answers(as_evaluated(checkpoint, tmp_path / "epoch-1"), utterances)
    model, _ = exported(tmp_path / "new", tmp_path / "epoch-1")
    own_texts, own_scores = answers(model.eval(), utterances)
    assert own_texts == texts and len({*texts}) > 1
    torch.testing.assert_close(own_scores, scores, rtol=0, atol=1e-6)
    base = load_file(checkpoint / "model.safetensors")
    changed = {
        name for name, weight in load_file(tmp_path / "new/model.safetensors").items() if not weight.equal(base[name])
    }
    assert any("layers" in name for name in changed) and ("audio_embed" in str(changed)) == (strategy != "lora")


def test_the_cards_lines_need_transformers_alone_and_give_the_same_answer(adapter, checkpoint, corpus, tmp_path):
    _, said = exported(tmp_path / "new", adapter)
    card = (tmp_path / "new/README.md").read_text()
    (utterance, *_) = data.read_corpus(corpus, "test")
    (tmp_path / "a.wav").write_bytes(utterance.recording())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert said[0].capitalize()[:20] in card and "was not measured" in card
    for task in prompts.TASKS:
        given = {"folder": str(tmp_path / "new"), "file": str(tmp_path / "a.wav")}
        exec(code.replace('["APA"]', f'["{task}"]').replace("=200", f"={TOKENS}"), given)
        texts, _ = answers(as_evaluated(checkpoint, adapter), [utterance])
        assert given["answer"] == re.sub(r"<\|\w+\|>", "", texts[prompts.TASKS.index(task)])


@pytest.mark.parametrize("strategy, way", WAYS)
def test_the_lines_beside_an_adapter_load_the_model_that_was_trained(
    new_model, checkpoint, corpus, examples, tmp_path, strategy, way
):
    folder = tmp_path / "epoch-1"
    train(new_model, checkpoint, corpus, folder, strategy, way)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    given = {"adapter": str(folder)}
    exec(code, given)
    ids, trained = torch.tensor([examples[0].prompt_ids]), as_evaluated(checkpoint, folder)
    assert given["tokenizer"].convert_tokens_to_ids([*prompts.CONTROL_TOKENS.values()]) == models.control_token_ids(
        trained.tokenizer
    )
    heard = trained.prepare.recording(examples[0].utterance).features[None]
    sound = {"audio_input_features": heard, "audio_embed_sizes": torch.tensor([examples[0].utterance.audio_tokens])}
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, **sound).logits for model in (given["model"], trained.core)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy, way", [pair for pair in WAYS if pair[0] != "full"])
def test_plain_peft_refuses_an_adapter_that_does_not_fit_the_bare_checkpoint(
    new_model, checkpoint, corpus, tmp_path, strategy, way
):
    train(new_model, checkpoint, corpus, tmp_path / "epoch-1", strategy, way)
    bare = Phi4MultimodalForCausalLM.from_pretrained(checkpoint)
    if (strategy, way) in {("lora", "continue"), ("lora", "none")}:
        PeftModel.from_pretrained(bare, tmp_path / "epoch-1")
    else:
        with pytest.raises(ValueError, match=re.escape(cards.GUARD)):
            PeftModel.from_pretrained(bare, tmp_path / "epoch-1")


def test_the_front_matter_names_hub_ids_and_no_folders(new_model, checkpoint, corpus, tmp_path):
    settings = train(new_model, checkpoint, corpus, tmp_path / "epoch-1")
    assert "base_model" not in cards.of_adapter(settings, "x") and "datasets" not in cards.of_adapter(settings, "x")
    hub = settings | {"model": "a/b", "revision": "c" * 40, "data": "d/e", "data_revision": "f" * 40}
    card = cards.of_adapter(hub, "x")
    assert "base_model: a/b\ndatasets:\n- d/e\n" in card and f"(commit {'c' * 40})" in card
    numbers = {"evaluated": "epoch-1", "per": 0.2, "per_low": 0.1, "per_high": 0.3}
    exported = cards.of_checkpoint(hub, "transformers", ["x"], numbers)
    assert "- type: per\n      value: 0.2\n" in exported and "| per | 0.200 | 0.100 to 0.300 |" in exported


def test_the_card_has_the_numbers_of_the_epoch_that_is_exported_and_of_no_other(adapter, tmp_path):
    evaluation = export.check(export.Settings(folder=tmp_path / "new", adapter=adapter))
    for label, found in (("epoch-1", True), ("epoch-2", False)):
        (adapter / "metrics.json").write_text(json.dumps({"evaluated": label, "utterances": 2, "wer": 0.1}))
        assert bool(export.numbers_of(evaluation, adapter)) == found


def test_the_control_tokens_are_in_the_tokenizer_whatever_class_reads_it(adapter, checkpoint, tmp_path):
    model, _ = exported(tmp_path / "new", adapter)
    own = AutoTokenizer.from_pretrained(tmp_path / "new")
    for task in prompts.TASKS:
        text = prompts.build_prompt(task)
        assert own.encode(text) == model.tokenizer.encode(text, add_special_tokens=False)
    assert json.loads((tmp_path / "new/prompts.json").read_text())["MDD"] == prompts.build_prompt("MDD")
    stops = json.loads((tmp_path / "new/generation_config.json").read_text())["eos_token_id"]
    assert stops == [own.convert_tokens_to_ids(prompts.END), own.eos_token_id]


def test_the_control_tokens_keep_their_ids_where_the_vocabulary_has_holes(adapter, checkpoint, tmp_path):
    (tmp_path / "holes").mkdir()
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|tag|>"] = 5000
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<|tag|>"})
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "holes" / "tokenizer.json"))
    tokenizer.add_tokens([*prompts.CONTROL_TOKENS.values()], special_tokens=True)
    export.add_control_tokens(tmp_path / "holes", tokenizer)
    own = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "holes" / "tokenizer.json"))
    assert own.get_vocab() == tokenizer.get_vocab() and own.get_vocab()["<|tag|>"] == 5000


def test_weights_in_several_files_are_the_same_weights(adapter, tmp_path, monkeypatch):
    exported(tmp_path / "one", adapter)
    monkeypatch.setattr(export, "SHARD", 10**6)
    exported(tmp_path / "several", adapter)
    parts = [load_file(path) for path in (tmp_path / "several").glob("model-*.safetensors")]
    one, index = load_file(tmp_path / "one/model.safetensors"), tmp_path / "several/model.safetensors.index.json"
    assert len(parts) > 2 and sum(map(len, parts)) == len(one) == len(json.loads(index.read_text())["weight_map"])
    assert all(weight.equal(one[name]) for part in parts for name, weight in part.items())


@pytest.mark.parametrize("way", ["merge", "continue", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_a_folded_layer_is_what_training_held_with_what_was_learnt_rounded_once(
    new_model, checkpoint, corpus, tmp_path, held, dtype, way
):
    train(new_model, checkpoint, corpus, tmp_path / "epoch-1", way=way, dtype=held)
    _, said = exported(tmp_path / "new", tmp_path / "epoch-1", dtype=dtype)
    weights = load_file(tmp_path / "new/model.safetensors")
    core = as_evaluated(checkpoint, tmp_path / "epoch-1").core
    layers = {name: module for name, module in core.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        expected = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
        assert weights[f"{name}.weight"].equal(expected.to(getattr(torch, dtype)))
    assert len(layers) == 4 * len(core.model.layers) and ("0.00% of that change" in said[0]) == (dtype == "float32")
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == dtype


def test_from_four_bits_the_layers_are_those_that_training_fitted_to(new_model, checkpoint, corpus, tmp_path):
    train(new_model, checkpoint, corpus, tmp_path / "epoch-1", quantize="nf4")
    model, said = exported(tmp_path / "new", tmp_path / "epoch-1")
    trained = as_evaluated(checkpoint, tmp_path / "epoch-1")
    layer = trained.core.model.layers[0].mlp.down_proj
    weight = layer.get_base_layer().weight
    import bitsandbytes.functional as B

    held = B.dequantize_4bit(weight.data, weight.quant_state).float()
    expected = held + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
    torch.testing.assert_close(model.core.model.layers[0].mlp.down_proj.weight, expected, rtol=0, atol=1e-6)
    assert len(said) == 2 and "4 bits" in said[1]


def change(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


@pytest.mark.parametrize("dtype, size", [("float32", 0.0), ("bfloat16", 1e-15)])
def test_an_adapter_that_changes_no_layer_is_refused_and_leaves_nothing(adapter, tmp_path, dtype, size):
    def shrink(weights):
        weights.update({name: weight * size for name, weight in weights.items() if "lora_B" in name})

    change(adapter / "adapter_model.safetensors", shrink)
    with pytest.raises(cli.InputError, match="changes no layer"):
        exported(tmp_path / "new", adapter, dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-1"}


def lose_a_layer(weights):
    for side in "AB":
        del weights[f"base_model.model.model.layers.0.mlp.down_proj.lora_{side}.weight"]


def lose_a_side(weights):
    del weights["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]


def cut_a_layer(weights):
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    weights[name] = weights[name][:, 1:].clone()


def add_something(weights):
    weights["base_model.model.lm_head.weight"] = torch.ones(2)


@pytest.mark.parametrize("edit", [lose_a_layer, lose_a_side, cut_a_layer, add_something])
def test_an_adapter_that_does_not_fit_is_refused(adapter, tmp_path, edit):
    change(adapter / "adapter_model.safetensors", edit)
    with pytest.raises(cli.InputError, match="cannot be loaded"):
        exported(tmp_path / "new", adapter)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["there", "--adapter", "epoch-1"], "there exists"),
        (["new", "--adapter", "epoch-1", "--format", "microsoft"], "go together"),
        (["new", "--adapter", "epoch-1", "--like", "there"], "go together"),
        (["new", "--adapter", "epoch-1", "--format", "microsoft", "--like", "there"], "config.json"),
        (["new", "--adapter", "epoch-1", "--epochs", "all"], "one model"),
        (["new", "--adapter", "epoch-1", "--revision", "main"], "is a folder"),
        (["new", "--adapter", "nowhere"], "holds no adapter"),
        (["new"], "--adapter"),
    ],
)
def test_a_users_mistake_is_named(adapter, monkeypatch, tmp_path, arguments, message):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    with pytest.raises(cli.InputError, match=re.escape(message)):
        export.main()
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named_before_anything_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(cli.InputError, match="0.0 GB of free disk"):
        exported(tmp_path / "new", adapter)


# ----------------------------------------------------------------------------------------------------------------------
# Microsoft's layout


@pytest.fixture
def like(checkpoint, tmp_path):
    """A copy of Microsoft's repository for the tiny model: its code, configuration, tokenizer, and index of weights."""
    folder = tmp_path / "like"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, folder)
    (folder / "config.json").write_text('{"model_type": "phi4mm", "auto_map": {"AutoConfig": "c.Phi4MMConfig"}}')
    (folder / "modeling_phi4mm.py").write_text("raise SystemExit")
    names = []
    for name in load_file(checkpoint / "model.safetensors"):
        for theirs, ours in THEIRS.items():
            in_part = "encoder.encoders" in name if theirs[1:4] in ("net", "lin") else "encoder.encoders" not in name
            if in_part and ours in name and "img_processor" not in name:
                name = name.replace(ours, theirs)
                break
        if re.search(r"layers\.\d+\..*proj", name) and "img_processor" not in name:
            module = name.removesuffix(".weight")
            names += [f"{module}.base_layer.weight", f"{module}.lora_A.speech.weight", f"{module}.lora_B.vision.weight"]
        else:
            names.append(name)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def to_transformers(name):
    for theirs, ours in THEIRS.items():
        if theirs in name and "img_processor" not in name:
            return name.replace(theirs, ours)
    return name


def test_microsofts_layout_maps_there_and_back(adapter, like, tmp_path):
    exported(tmp_path / "ours", adapter)
    export.export(export.Settings(folder=tmp_path / "new", adapter=adapter, format="microsoft", like=like))
    ours, new = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "new"))
    assert {to_transformers(name) for name in new} == ours.keys() and sum(name in ours for name in new) < len(ours)
    assert all(weight.equal(ours[to_transformers(name)]) for name, weight in new.items())
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert "modeling_phi4mm.py" in files and "model.safetensors.index.json" not in files
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["model_type"] == "phi4mm" and config["torch_dtype"] == "float32"
    assert prompts.CONTROL_TOKENS["APA"] in (tmp_path / "new/tokenizer.json").read_text()
    assert "No engine was run" in (tmp_path / "new/README.md").read_text()


def test_a_copy_of_another_model_is_refused(adapter, like, tmp_path):
    index = like / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("glb_GN", "other"))
    with pytest.raises(cli.InputError, match="2 weights are not those of this model"):
        export.export(export.Settings(folder=tmp_path / "new", adapter=adapter, format="microsoft", like=like))
