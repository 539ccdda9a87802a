import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import data
import model as models
import train


def settings(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.parse_settings()


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and arithmetic


def test_the_learning_rate_at_start_end_of_warmup_middle_and_end():
    rate = [train.learning_rate(step, steps=110, peak=2e-5, warmup=10) for step in range(111)]
    assert rate[0] == pytest.approx(2e-6)
    assert rate[9] == rate[10] == max(rate) == 2e-5
    assert rate[60] == pytest.approx(1e-5)
    assert 0 < rate[109] < 1e-8 and rate[110] == pytest.approx(0, abs=1e-12)
    assert rate[:10] == sorted(rate[:10]) and rate[10:] == sorted(rate[10:], reverse=True)


def test_the_papers_run_has_78_steps_an_epoch_and_says_what_becomes_of_the_rest(monkeypatch, capsys):
    plan = train.batch_arithmetic(5000, settings(monkeypatch, "--rank", 64, "--epochs", 3))
    assert plan == {"step_size": 64, "per_epoch": 78, "steps": 234, "warmup": 8}
    printed = capsys.readouterr().out
    assert "8 examples x 8 micro-batches = 64 a step; 5,000 examples = 78 steps an epoch" in printed
    assert "the 8 examples over are left out of an epoch" in printed


def test_a_corpus_smaller_than_a_step_is_trained_on_whole(monkeypatch, capsys):
    plan = train.batch_arithmetic(20, settings(monkeypatch))
    assert plan == {"step_size": 20, "per_epoch": 1, "steps": 3, "warmup": 1}
    assert "left out" not in capsys.readouterr().out


def test_defaults_are_the_papers_settings_and_the_projects_own_where_it_has_none(monkeypatch):
    values = vars(settings(monkeypatch))
    expected = dict(batch_size=8, accumulation=8, learning_rate=2e-5, epochs=3, warmup=0.03, rank=64, alpha=128,
                    dropout=0.05, strategy="lora", data="mispeech/speechocean762")  # fmt: skip
    assert {key: values[key] for key in expected} == expected


def test_help_shows_every_setting_with_its_default(monkeypatch, capsys):
    values = vars(settings(monkeypatch))
    with pytest.raises(SystemExit):
        settings(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in values:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") == len(values)


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers.Trainer


class PlainModel(nn.Module):
    """transformers' own forward and loss, full logits included, behind the arguments that Trainer passes."""

    def __init__(self, model, utterances):
        super().__init__()
        self.model, self.utterances = model, utterances

    def forward(self, input_ids, labels, attention_mask, row, **kwargs):
        audio = self.model.audio_embeddings([self.utterances[i] for i in row.tolist()])
        embeds = self.model._inputs_embeds(input_ids, audio)
        return self.model.core(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **kwargs)


def test_one_optimiser_step_equals_transformers_trainer(monkeypatch, checkpoint, corpus, tmp_path):
    """The same 64 examples, no dropout: Trainer over random micro-batches, ours over sorted ones."""
    where = ["--model", checkpoint, "--data", corpus, "--output", tmp_path / "ours"]
    how = ["--speech-adapter", "continue", "--learning-rate", 1e-3, "--limit", 32, "--epochs", 1]
    chosen = settings(monkeypatch, *where, *how)
    config = checkpoint / models.SPEECH_ADAPTER / "adapter_config.json"
    assert json.loads(config.read_text())["lora_dropout"] == 0.0
    train.train(chosen)
    log = [json.loads(line) for line in (tmp_path / "ours" / "log.jsonl").read_text().splitlines()]
    ours = load_file(tmp_path / "ours" / "epoch-1" / "adapter_model.safetensors")
    assert len(log) == 1 and log[0]["learning_rate"] == 1e-3

    utterances = data.read_corpus(corpus, "train", limit=32)
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", "continue")
    models.add_adapter(model, None, None, None)
    models.set_trainable(model, "lora")
    examples = [
        (i, e) for i, u in enumerate(utterances) for e in data.make_examples(u, model.tokenizer, model.audio_id)
    ]
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model.network).items()}

    def collator(rows):
        batch = data.collate([example for _, example in rows], model.pad_id)
        return {key: torch.as_tensor(value) for key, value in batch.items()} | {
            "row": torch.tensor([i for i, _ in rows])
        }

    trainer = Trainer(
        PlainModel(model, utterances),
        TrainingArguments(
            str(tmp_path / "theirs"), per_device_train_batch_size=8, gradient_accumulation_steps=8, max_steps=1,
            learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
            remove_unused_columns=False, report_to=[], save_strategy="no", use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    theirs = get_peft_model_state_dict(model.network)

    assert log[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-4)
    assert log[0]["gradient_norm"] == pytest.approx(trainer.state.log_history[0]["grad_norm"], rel=1e-4)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        step = (value - before[key]).norm()
        assert step > 0 and (ours[key] - value).norm() / step < 1e-2, key
        assert (ours[key] - value).norm() / value.norm() < 1e-4, key


def test_a_gradient_above_the_limit_is_clipped_to_it(monkeypatch, checkpoint, corpus, tmp_path):
    norms = []

    class Recorder(torch.optim.AdamW):
        def step(self):
            norms.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    train.train(settings(monkeypatch, "--model", checkpoint, "--data", corpus, "--limit", 4, "--epochs", 2, "--rank", 4,
                         "--clip", 0.01, "--output", tmp_path))  # fmt: skip
    logged = [json.loads(line)["gradient_norm"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert min(logged) > 0.02 and [norm.item() for norm in norms] == pytest.approx([0.01] * 2, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts


def test_a_run_prints_its_arithmetic_trained_groups_and_settings_before_it_starts(run):
    lines = run[1].stdout.splitlines()[:10]
    for expected in ("4 examples x 2 micro-batches = 8 a step; 20 examples = 2 steps an epoch", "trained: LoRA",
                     "settings: data=", "10 utterances of 1 speakers"):  # fmt: skip
        assert any(expected in line for line in lines), expected


def test_a_run_logs_every_step_and_saves_an_adapter_an_epoch(run):
    out = run[0] / "out"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in log] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(0 <= line["padding"] < 0.5 and line["supervised_tokens"] < line["tokens"] for line in log)
    for epoch in (1, 2):
        saved = json.loads((out / f"epoch-{epoch}" / "settings.json").read_text())
        assert saved["epoch"] == epoch and saved["rank"] == 4 and saved["versions"]["torch"] == torch.__version__
    first, last = (load_file(out / f"epoch-{epoch}" / "adapter_model.safetensors") for epoch in (1, 2))
    assert any(not torch.equal(first[key], last[key]) for key in first)


def test_the_same_seed_gives_the_same_weights(monkeypatch, checkpoint, corpus, tmp_path):
    def weights(name, seed):
        train.train(settings(monkeypatch, "--model", checkpoint, "--data", corpus, "--limit", 6, "--epochs", 1,
                             "--rank", 4, "--batch-size", 4, "--accumulation", 1, "--seed", seed,
                             "--output", tmp_path / name))  # fmt: skip
        return load_file(tmp_path / name / "epoch-1" / "adapter_model.safetensors")

    one, again, other = weights("one", 1), weights("again", 1), weights("other", 2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_not_overwritten(run, checkpoint, corpus):
    result = script(ROOT / "train.py", "--model", checkpoint, "--data", corpus, cwd=run[0])
    assert result.returncode == 2 and "out holds a run already" in result.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "0"], "0 is not a whole number from 1 up"),
    (["--rank", "many"], "many is not a whole number from 1 up"),
    (["--dropout", "1.5"], "1.5 is not a fraction"),
    (["--learning-rate", "-1"], "-1 is not a positive number"),
    (["--learning-rate", "fast"], "fast is not a positive number"),
    (["--seed", "-1"], "-1 is not a seed"),
    (["--weight-decay", "nan"], "nan is not a fraction"),
    (["--speech-adapter", "continue", "--rank", "64"], "leave out --rank"),
])  # fmt: skip
def test_a_wrong_setting_is_named_with_its_value(monkeypatch, arguments, message):
    with pytest.raises(data.InputError, match=re.escape(message)):
        settings(monkeypatch, *arguments)


@pytest.mark.parametrize("arguments, message", [
    (["--data", "no/such/folder"], "corpus folder no/such/folder does not exist"),
    (["--model", ROOT / "tests"], "holds no checkpoint"),
    (["--output", Path(__file__) / "out"], "cannot write into"),
    (["--model", "tiny/nowhere"], "tiny/nowhere (not a folder here, so one from the hub) needs a CUDA GPU"),
])  # fmt: skip
def test_a_users_mistake_ends_with_2_and_one_line_before_anything_slow(
    arguments, message, checkpoint, corpus, tmp_path
):
    result = script(ROOT / "train.py", "--model", checkpoint, "--data", corpus, *arguments, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())
    assert result.stderr.startswith("train.py: error: ") and len(result.stderr.splitlines()) == 1
