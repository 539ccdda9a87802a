"""analysis.export: a checkpoint that stands alone answers as the adapter did; the cards' lines do what they say."""

import json
import re
import shutil

from conftest import TRAINED
from filelock import FileLock
import pytest
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from analysis import export
import data
import evaluate
import model as models
import prompts
from support import cli

WAYS = [("lora", "merge"), ("lora", "continue"), ("unfreeze", "merge"), ("unfreeze", "none")]
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


@pytest.fixture
def train(new_model, checkpoint, corpus, tmp_path):
    """Makes the folder of an epoch whose trained weights were changed at random."""

    def make(strategy="lora", way="merge", size=0.02, **changes):
        settings = TRAINED | {"strategy": strategy, "speech_adapter": way, "model": str(checkpoint)} | changes
        settings |= {"data": str(corpus), "prompts": prompts.digest()}
        model = new_model(strategy, way, dtype=settings["dtype"], quantize=settings["quantize"])
        torch.manual_seed(0)
        for parameter in models.trained_parameters(model).values():
            parameter.data.add_(size * torch.randn_like(parameter))
        models.save_trained(model, tmp_path / "epoch-1", settings)
        return tmp_path / "epoch-1"

    return make


def exported(folder, adapter, **settings):
    said = export.export(export.Settings(folder=folder, adapter=adapter, **settings))
    return models.load_base(str(folder), None, "float32", "sdpa", "none").eval(), said


def as_evaluated(adapter):
    asked = evaluate.ModelSettings(adapter=adapter)
    (evaluation,) = evaluate.evaluations(asked)
    return evaluate.load(evaluation, evaluate.choose_model(evaluation, asked))


def answers(model, utterances):
    lines = model.answer(utterances, ("greedy", "expected"), TOKENS, True)
    scores = [values for line in lines if line["task"] == "APA" for values in line["scores"].values()]
    return [line["output"] for line in lines], torch.tensor(scores)


@pytest.mark.parametrize("strategy, way", WAYS)
def test_an_exported_checkpoint_answers_as_the_adapter_did(train, corpus, tmp_path, strategy, way):
    adapter, utterances = train(strategy, way), data.read_corpus(corpus, "test", None, 8)
    texts, scores = answers(as_evaluated(adapter), utterances)
    own_texts, own_scores = answers(exported(tmp_path / "new", adapter)[0], utterances)
    assert own_texts == texts and len({*texts}) > 1
    torch.testing.assert_close(own_scores, scores, rtol=0, atol=1e-5)


def test_the_cards_lines_need_transformers_alone_and_give_the_same_answer(train, corpus, tmp_path):
    adapter, (utterance,) = train(), data.read_corpus(corpus, "test", None, 1)
    _, said = exported(tmp_path / "new", adapter)
    card = (tmp_path / "new/README.md").read_text()
    (tmp_path / "a.wav").write_bytes(utterance.recording())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    texts, _ = answers(as_evaluated(adapter), [utterance])
    assert said in card and "was not measured" in card
    for task, text in zip(prompts.TASKS, texts):
        given = {"folder": str(tmp_path / "new"), "file": str(tmp_path / "a.wav")}
        exec(code.replace('["APA"]', f'["{task}"]').replace("=200", f"={TOKENS}"), given)
        assert given["answer"] == re.sub(r"<\|\w+\|>", "", text)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "another."])
@pytest.mark.parametrize("strategy, way", WAYS)
def test_the_lines_beside_an_adapter_load_the_model_that_was_trained(
    train, checkpoint, examples, tmp_path, strategy, way, prefix
):
    (code,) = re.findall(r"```python\n(.*?)```", (train(strategy, way) / "README.md").read_text(), re.S)
    base = shutil.copytree(checkpoint, tmp_path / "base")
    shipped = load_file(path := base / "speech-lora/adapter_model.safetensors")
    save_file({prefix + name.removeprefix("base_model.model."): weight for name, weight in shipped.items()}, path)
    given = {"base": str(base), "adapter": str(tmp_path / "epoch-1")}
    if way == "merge" and prefix == "another.":
        with pytest.raises(ValueError, match="another"):
            exec(code, given)
        return
    exec(code, given)
    trained = as_evaluated(tmp_path / "epoch-1")
    assert given["tokenizer"].convert_tokens_to_ids(given["tokens"]) == trained.control_ids
    ids, audio = torch.tensor([examples[0].prompt_ids]), trained.hear([examples[0].utterance])
    with torch.no_grad():
        expected = trained.core(inputs_embeds=trained.embed(ids, audio)).logits
        embeds = given["model"].get_input_embeddings()(ids).masked_scatter(ids[..., None] == trained.audio_id, audio[0])
        torch.testing.assert_close(given["model"](inputs_embeds=embeds).logits, expected, rtol=0, atol=1e-5)


def test_the_card_names_hub_ids_alone_and_the_numbers_of_its_own_epoch(train, tmp_path):
    adapter = train(revision="c" * 40, data_revision="f" * 40)
    (evaluation,) = evaluate.evaluations(evaluate.ModelSettings(adapter=adapter))
    hub = evaluation.training.model_copy(update={"model": "a/b", "data": "d/e"})
    for label in ("epoch-1", "epoch-2"):
        numbers = {"evaluated": label, "utterances": 2, "per": 0.2, "per_low": 0.1, "per_high": 0.3}
        (adapter / "metrics.json").write_text(json.dumps(numbers))
        card = export.card(hub, "x", export.scores(evaluation, adapter), False)
        assert ("| per | 0.200 | 0.100 to 0.300 |" in card) == (label == "epoch-1") == ("not measured" not in card)
        assert "base_model: a/b\ndatasets:\n- d/e\n---" in card and f"(commit {'c' * 40})" in card
    folders = hub.model_copy(update={"revision": None, "data_revision": None})
    assert not re.search("base_model:|datasets:", export.card(folders, "x", "", False))


def test_the_control_tokens_are_in_the_tokenizer_whatever_class_reads_it(train, tmp_path):
    model, _ = exported(tmp_path / "new", train())
    own = AutoTokenizer.from_pretrained(tmp_path / "new")
    texts = json.loads((tmp_path / "new/prompts.json").read_text())
    assert texts == {task: prompts.build_prompt(task) for task in prompts.TASKS}
    for text in texts.values():
        assert own.encode(text) == model.tokenizer.encode(text, add_special_tokens=False)
    stops = json.loads((tmp_path / "new/generation_config.json").read_text())["eos_token_id"]
    assert stops == [own.convert_tokens_to_ids(prompts.END), own.eos_token_id]


def test_added_tokens_keep_their_ids_where_the_vocabulary_has_holes(checkpoint, tmp_path):
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|tag|>"] = 5000
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<|tag|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([*prompts.CONTROL_TOKENS.values()], special_tokens=True)
    export.add_control_tokens(tmp_path, tokenizer)
    own = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert own.get_vocab() == tokenizer.get_vocab() and own.get_vocab()["<|tag|>"] == 5000


@pytest.mark.parametrize(
    "held, dtype, quantize",
    [("float32", "float32", None), ("bfloat16", "float32", None), ("bfloat16", "bfloat16", None)]
    + [("float32", "bfloat16", None), ("float32", "float32", "nf4")],
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
        expected = weight.float() + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
        assert weights[f"{name}.weight"].equal(expected.to(getattr(torch, dtype)))
    assert len(layers) == 4 * len(core.model.layers) and ("takes 0.00%" in said) == (dtype == "float32")
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == dtype
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}


def test_what_was_not_written_here_is_kept_and_one_export_at_a_time_writes(train, tmp_path):
    adapter, new = train(), tmp_path / "new"
    exported(new, adapter)
    (new / "model-00001-of-00002.safetensors").write_text("of an older one")
    exported(new, adapter)
    assert [path.name for path in new.glob("model*")] == ["model.safetensors"]
    with FileLock(new / ".pronunciation-analysis.export.lock"), pytest.raises(cli.InputError, match="in use"):
        exported(new, adapter)
    (new / "README.md").write_text("mine")
    with pytest.raises(cli.InputError, match="choose another"):
        exported(new, adapter)
    assert (new / "README.md").read_text() == "mine"


@pytest.mark.parametrize("dtype, size", [("float32", 0.0), ("bfloat16", 1e-15)])
def test_an_adapter_that_changes_no_layer_is_refused_and_leaves_no_model(train, tmp_path, dtype, size):
    with pytest.raises(cli.InputError, match="changes no layer"):
        exported(tmp_path / "new", train(size=size), dtype=dtype)
    assert not [path for path in (tmp_path / "new").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--like", "."], "config.json"),
        (["--epochs", "all"], "one model"),
        (["--adapter", "nowhere"], "holds no adapter"),
    ],
)
def test_a_users_mistake_is_named_before_anything_is_written(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr("sys.argv", ["export", "new", "--adapter", "epoch-1", *arguments])
    with pytest.raises(cli.InputError, match=message):
        export.main()
    assert not (tmp_path / "new").exists()


def to_transformers(name):
    for theirs, ours in THEIRS.items():
        if theirs in name and "img_processor" not in name:
            return name.replace(theirs, ours)
    return name


def test_microsofts_layout_maps_there_and_back(train, checkpoint, tmp_path):
    adapter, like, new = train(), shutil.copytree(checkpoint, tmp_path / "like"), tmp_path / "new"
    exported(tmp_path / "ours", adapter)
    ours = load_file(tmp_path / "ours/model.safetensors")
    (like / "config.json").write_text('{"model_type": "phi4mm", "auto_map": {"AutoConfig": "c.Phi4MMConfig"}}')
    (like / "modeling_phi4mm.py").write_text("raise SystemExit")
    names = []
    for name in map(export.microsoft_name, ours):
        if re.search(r"layers\.\d+\..*proj", name) and "img_processor" not in name:
            module = name.removesuffix(".weight")
            names += [f"{module}.base_layer.weight", f"{module}.lora_A.speech.weight", f"{module}.lora_B.vision.weight"]
        else:
            names.append(name)
    for wrong in ("glb_GN", None):
        index = {"weight_map": {name: "m.safetensors" for name in names if wrong is None or wrong not in name}}
        (like / "model.safetensors.index.json").write_text(json.dumps(index))
        asked = export.Settings(folder=new, adapter=adapter, like=like)
        if wrong:
            with pytest.raises(cli.InputError, match="1 weights are not those of this model"):
                export.export(asked)
    export.export(asked)
    theirs = load_file(new / "model.safetensors")
    assert {to_transformers(name) for name in theirs} == ours.keys() and sum(n in ours for n in theirs) < len(ours) - 30
    assert all(weight.equal(ours[to_transformers(name)]) for name, weight in theirs.items())
    assert (new / "modeling_phi4mm.py").exists() and not (new / "model.safetensors.index.json").exists()
    config = json.loads((new / "config.json").read_text())
    assert config["model_type"] == "phi4mm" and config["torch_dtype"] == "float32"
    assert prompts.CONTROL_TOKENS["APA"] in (new / "tokenizer.json").read_text()
    assert "No engine was run" in (new / "README.md").read_text()
