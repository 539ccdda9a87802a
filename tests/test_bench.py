"""That the benchmarks compare like with like. How fast anything is, is not tested."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "bench"))

import data
import loader
import model as models


def imported(name):
    """A module of bench/; its evaluate.py has the name of the project's own."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


workload, train_step, evaluation, scaling, readme = map(
    imported, ("workload", "train_step", "evaluate", "scaling", "readme")
)
STEP = 8  # examples, where a benchmark has 64


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    workload.write_corpus(folder, 2 * STEP)
    return folder


@pytest.fixture(scope="module")
def measured(noise):
    """A step of 8 examples in micro-batches of 2, by each contestant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "STEP", STEP)
        patch.setattr(train_step, "MICRO_BATCH", 2)
        names = [name for name in ("Trainer", "Trainer, audio unpadded", "SFTTrainer", "ours")
                 if not train_step.why_not(name)]  # fmt: skip
        return {name: train_step.measure(name, noise, full=False)["steps"] for name in names}


def test_contestants_train_on_the_same_tokens_to_the_same_losses(measured):
    for ours, theirs in zip(measured["ours"], measured["Trainer, audio unpadded"], strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["padding"] < theirs["padding"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    losses = [step["loss"] for step in measured["ours"]]
    assert losses[2] < losses[1]  # the same step again


def test_transformers_padded_audio_is_why_the_plain_trainer_has_another_loss(measured):
    """By less than a tenth of a per cent; SFTTrainer goes the same way."""
    ours = measured["ours"][0]["loss"]
    for name in measured.keys() - {"ours", "Trainer, audio unpadded"}:
        assert 1e-6 < abs(measured[name][0]["loss"] / ours - 1) < 1e-3


def test_the_work_of_a_step_is_what_a_counter_of_operations_counts(noise):
    utterances = data.read_corpus(noise, "train", limit=4)
    model = workload.new_model("scaled", workload.texts_of(utterances))
    models.add_adapter(model, workload.RANK["scaled"], 16, dropout=0.0)
    models.set_trainable(model, "lora")
    model.core.set_attn_implementation("eager")  # whose two products are counted, and not as causal ones
    examples = data.Examples(utterances, model.tokenizer, model.audio_id)
    batch = model.prepare([examples[0], examples[3]])
    audio = model.embed(batch.recordings)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, audio).backward()
    config = model.core.config
    rows, longest = batch.input_ids.shape
    products = rows * longest**2 * config.hidden_size * config.num_hidden_layers
    # the counter has 6 products, all of them whole; ours are 7, the seventh being flash attention's, and half
    expected = train_step.operations(model, batch) + 2 * (6 - 3.5) * products
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_scaled_models_proportions_are_the_real_models():
    def shares(shape):
        with torch.device("meta"):
            network = models.Phi4MultimodalForCausalLM(workload.Phi4MultimodalConfig(**workload.SHAPES[shape]))
        layers = sum(p.numel() for p in network.model.layers.parameters() if p.ndim == 2)
        encoder = sum(p.numel() for p in network.model.embed_tokens_extend.audio_embed.encoder.encoders.parameters())
        rank = workload.RANK[shape] / network.config.hidden_size
        return network.lm_head.weight.numel() / (layers + network.lm_head.weight.numel()), encoder / layers, rank

    scaled, full = shares("scaled"), shares("full")
    assert scaled[0] == pytest.approx(full[0], abs=0.005) and full[0] == pytest.approx(0.16, abs=0.005)
    assert scaled[1] == pytest.approx(full[1], rel=0.2) and scaled[2] == pytest.approx(full[2])


def test_every_way_to_write_answers_runs_on_the_same_utterances(noise, monkeypatch):
    utterances = data.read_corpus(noise, "test", limit=3)
    model = workload.new_model("scaled", workload.texts_of(utterances))
    models.add_adapter(model, 8, 16, dropout=0.0)
    models.merge_rows(model.eval())
    forward, read = type(model.core.model).forward, []
    monkeypatch.setattr(type(model.core.model), "forward", lambda self, *args, **kwargs: read.append(1) or
                        forward(self, *args, **kwargs))  # fmt: skip
    passes = {}
    for name, (way, task) in evaluation.WAYS.items():
        read.clear()
        way(model, utterances, task, lambda batch, task: 3, size=2)
        passes[name] = len(read)
    assert passes == {"APA, one at a time": 9, "MDD, one at a time": 9, "APA, batched": 6, "MDD, batched": 6,
                      "APA, expected scores": 8}  # fmt: skip


def test_a_repeated_corpus_is_read_trained_on_and_embedded(noise, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "STEP", 4)
    monkeypatch.setattr(scaling, "MICRO_BATCH", 2)
    scaling.repeat(noise, tmp_path / "corpus", 20)
    utterances = data.read_corpus(tmp_path / "corpus", "train")
    assert len(utterances) == 20 and utterances[0].recording() == utterances[2 * STEP].recording()
    written = []
    write = loader.AudioCache.write
    monkeypatch.setattr(loader.AudioCache, "write", lambda self, file, rows: written.append(file) or
                        write(self, file, rows))  # fmt: skip
    figures = scaling.measure(tmp_path / "corpus")
    assert len(set(written)) >= 20 and 0 < figures["started_gb"] <= figures["peak_gb"]


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    text = readme.README.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(text)
    monkeypatch.setattr(readme, "README", copy)
    readme.write_tables()
    assert copy.read_text() == text
    names = {json.loads(path.read_text())["benchmark"] for path in (ROOT / "bench" / "results").glob("*.json")}
    assert {name.split("-")[0] for name in names} == {"train_step", "evaluate", "scaling"}
