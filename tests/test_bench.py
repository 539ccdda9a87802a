"""That the benchmarks compare like with like. How fast anything is, is not tested."""

import signal
import time

from processes import Process
import pytest
import torch

from bench import evaluate as evaluation
from bench import full_size, train_step, workload
import data
import model as models
import prompts

STEP = 4  # examples, where a benchmark has 64


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    workload.write_corpus(folder, 2 * STEP)
    return folder


@pytest.mark.slow
def test_contestants_train_on_the_same_tokens_to_the_same_losses(noise, monkeypatch):
    monkeypatch.setattr(train_step, "STEP", STEP)
    monkeypatch.setattr(train_step, "MICRO_BATCH", 2)
    contestants = "Trainer", "Trainer, audio unpadded", "ours"
    padded, unpadded, own = (train_step.measure(name, noise, full=False)["steps"] for name in contestants)
    for ours, theirs, wider in zip(own, unpadded, padded, strict=True):
        assert ours["tokens"] == theirs["tokens"] == wider["tokens"] and ours["padding"] < theirs["padding"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert wider["loss"] == pytest.approx(theirs["loss"], rel=1e-2)  # its embeddings depend on the batch
    assert own[2]["loss"] < own[1]["loss"]  # the same step again


def test_the_scaled_models_proportions_are_the_real_models():
    def shares(shape):
        with torch.device("meta"):
            network = workload.Phi4MultimodalForCausalLM(workload.Phi4MultimodalConfig(**workload.SHAPES[shape]))
        layers = sum(p.numel() for p in network.model.layers.parameters() if p.ndim == 2)
        encoder = sum(p.numel() for p in network.model.embed_tokens_extend.audio_embed.encoder.encoders.parameters())
        rank = workload.RANK[shape] / network.config.hidden_size
        return network.lm_head.weight.numel() / (layers + network.lm_head.weight.numel()), encoder / layers, rank

    scaled, full = shares("scaled"), shares("full")
    assert scaled[0] == pytest.approx(full[0], abs=0.005) and full[0] == pytest.approx(0.16, abs=0.005)
    assert scaled[1] == pytest.approx(full[1], rel=0.2) and scaled[2] == pytest.approx(full[2])


def test_every_way_to_write_answers_runs_on_the_same_utterances(noise):
    utterances = data.read_corpus(noise, "test", limit=3)
    model = workload.new_model("scaled", workload.texts_of(utterances))
    models.add_adapter(model, 8, 16, dropout=0.0)
    model.eval()
    read = []
    model.core.model.register_forward_hook(lambda *_: read.append(1))
    passes = {}
    for name, (way, task) in evaluation.WAYS.items():
        read.clear()
        way(model, utterances, task, lambda batch, task: 3, size=2)
        passes[name] = len(read)
    assert passes == {
        **dict.fromkeys(("APA, one at a time", "MDD, one at a time"), 9),
        **dict.fromkeys(("APA, batched", "MDD, batched"), 6),
        "APA, expected scores": 8,
    }


TINY = workload.SCALED | {"num_hidden_layers": 2}  # where the full-size benchmark has workload.FULL


@pytest.fixture(scope="module")
def tiny_full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "RANK", 4)
        full_size.write_inputs(folder, TINY, 2)
    return folder


def test_the_full_size_checkpoint_has_the_real_numbers_of_weights_and_the_real_ids():
    config, weights, lora, adapter = full_size.new_weights(workload.FULL)
    assert sum(weight.numel() for weight in adapter.values()) == 461_373_440
    # 5,574.5 million are reported, with 830.5 million in speech and vision adapter
    assert sum(weight.numel() for weight in weights.values()) / 1e6 == pytest.approx(5574.5 - 830.5, abs=0.1)
    ids = full_size.SPECIAL_TOKENS
    assert config.audio_config.audio_token_id == ids["<|endoftext11|>"]
    assert config.eos_token_id == [ids["<|endoftext|>"], ids[prompts.END]] and config.vocab_size == full_size.VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("case", full_size.CASES)
def test_every_full_size_case_is_trained_and_evaluated(case, tiny_full, tmp_path, monkeypatch):
    printed = []

    def forked(script, arguments, stop_at=None):
        process = Process(script.removesuffix(".py"), arguments, tmp_path)
        while stop_at and not any(stop_at[0].glob(stop_at[1])) and process.process.is_alive():
            time.sleep(0.01)
        if stop_at:
            process.signal(signal.SIGKILL)
        code, text = process.wait()
        assert code == 0 or stop_at, text
        printed.append(text)
        return {"seconds": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr(full_size, "run", forked)
    figures = full_size.measure(case, tiny_full)
    training = {"train.py, killed", "train.py --resume"} if case == "resume" else {"train.py"}
    assert figures.keys() == training | {"evaluate.py"} and all("loss" in figures[name] for name in training)
    assert ("resumed after step 1" in printed[1]) == (case == "resume")
    assert not (tiny_full / "run").exists()


@pytest.mark.slow
def test_a_script_is_measured_and_killed_once_its_file_is_there(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time\nhalf = bytearray(b'1' * 500_000_000)\nopen(sys.argv[1], 'w')\ntime.sleep(60)")
    figures = full_size.run(script, [tmp_path / "step-1.pt"], stop_at=(tmp_path, "step-*.pt"))
    assert figures["seconds"] < 50 and 0.5 < figures["peak_own_gb"] <= figures["peak_gb"] < 5
