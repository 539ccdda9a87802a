import importlib.machinery
import json
from pathlib import Path
import re
import sys
import types

from conftest import ROOT
import numpy as np
from peft import get_peft_model_state_dict
from processes import Process
import pytest
import runtime
from safetensors.torch import load_file
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import data
import evaluate
import model as models
import prompts
from support import cli
import train


def settings(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.parse_settings()


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and arithmetic


def test_the_learning_rate_at_start_end_of_warmup_middle_and_end():
    rate = [runtime.learning_rate(step, steps=110, peak=2e-5, warmup=10) for step in range(111)]
    assert rate[0] == pytest.approx(2e-6)
    assert rate[9] == rate[10] == max(rate) == 2e-5
    assert rate[60] == pytest.approx(1e-5)
    assert 0 < rate[109] < 1e-8 and rate[110] == pytest.approx(0, abs=1e-12)
    assert rate[:10] == sorted(rate[:10]) and rate[10:] == sorted(rate[10:], reverse=True)


def test_the_papers_run_has_78_steps_an_epoch_and_says_what_becomes_of_the_rest(monkeypatch, capsys):
    chosen = settings(monkeypatch)
    plan = train.batch_arithmetic(5000, chosen)
    assert chosen.learning_rate == 2e-5 and plan == {"step_size": 64, "per_epoch": 78, "steps": 234, "warmup": 8}
    printed = capsys.readouterr().out
    assert "8 examples x 8 micro-batches = 64 a step; 5,000 examples = 78 steps an epoch" in printed
    assert "the 8 examples over are left out of an epoch" in printed


def test_a_corpus_smaller_than_a_step_is_trained_on_whole(monkeypatch, capsys):
    plan = train.batch_arithmetic(20, settings(monkeypatch))
    assert plan == {"step_size": 20, "per_epoch": 1, "steps": 3, "warmup": 1}
    assert "left out" not in capsys.readouterr().out


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
        placeholders = (input_ids == self.model.audio_id).flatten().nonzero()[:, 0]
        embeds = self.model._inputs_embeds(input_ids, placeholders, audio)
        return self.model.core(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **kwargs)


@pytest.mark.parametrize("strategy", ["lora", "unfreeze"])
def test_one_optimiser_step_equals_transformers_trainer(monkeypatch, checkpoint, corpus, tmp_path, strategy):
    """The same 64 examples, no dropout: Trainer over random micro-batches, ours over sorted ones."""
    where = ["--model", checkpoint, "--data", corpus, "--output", tmp_path / "ours"]
    how = ["--speech-adapter", "continue", "--strategy", strategy]
    how += ["--learning-rate", 1e-3, "--limit", 32, "--epochs", 1]
    chosen = settings(monkeypatch, *where, *how)
    config = checkpoint / models.SPEECH_ADAPTER / "adapter_config.json"
    assert json.loads(config.read_text())["lora_dropout"] == 0.0
    train.train(chosen)
    log = [json.loads(line) for line in (tmp_path / "ours" / "log.jsonl").read_text().splitlines()]
    ours = {}
    for file in (tmp_path / "ours" / "epoch-1").glob("*.safetensors"):
        ours |= load_file(file)
    assert len(log) == 1 and log[0]["learning_rate"] == 1e-3

    utterances = data.read_corpus(corpus, "train", limit=32)
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", "continue")
    models.add_adapter(model, None, None, None)
    models.set_trainable(model, strategy)
    examples = [
        (i // len(prompts.TASKS), e) for i, e in enumerate(data.Examples(utterances, model.tokenizer, model.audio_id))
    ]

    def trained():
        return get_peft_model_state_dict(model.network) | models._outside_adapter(model, strategy)

    before = {key: value.detach().clone() for key, value in trained().items()}

    def collator(rows):
        batch = data.collate([example for _, example in rows], model.pad_id)
        lengths = torch.tensor([len(example) for _, example in rows])
        return {key: torch.as_tensor(value) for key, value in batch.items()} | {
            "attention_mask": (torch.arange(max(lengths)) < lengths[:, None]).long(),
            "row": torch.tensor([i for i, _ in rows]),
        }

    trainer = Trainer(
        PlainModel(model, utterances),
        TrainingArguments(
            str(tmp_path / "theirs"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            max_steps=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    theirs = trained()

    assert log[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-4)
    assert log[0]["gradient_norm"] == pytest.approx(trainer.state.log_history[0]["grad_norm"], rel=1e-4)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "audio_embed" in key and "k_proj.bias" in key:
            continue  # its gradient is zero but for rounding, of which Adam makes whole steps
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
    train.train(
        settings(
            monkeypatch,
            "--model",
            checkpoint,
            "--data",
            corpus,
            "--limit",
            4,
            "--epochs",
            2,
            "--rank",
            4,
            "--clip",
            0.01,
            "--output",
            tmp_path,
        )
    )
    logged = [json.loads(line)["gradient_norm"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert min(logged) > 0.02 and [norm.item() for norm in norms] == pytest.approx([0.01] * 2, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Guards


@pytest.fixture
def small(monkeypatch, checkpoint, corpus, tmp_path):
    """Settings of a run of two epochs of two steps into tmp_path/out, and further ones."""

    def make(*arguments):
        where = ["--model", checkpoint, "--data", corpus, "--output", tmp_path / "out"]
        sizes = ["--limit", 8, "--epochs", 2, "--batch-size", 4, "--accumulation", 2, "--learning-rate", 3e-3]
        return settings(monkeypatch, *where, *sizes, *arguments)

    return make


def logged(folder):
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run_names_step_and_utterances_and_changes_nothing(
    monkeypatch, small, corpus, tmp_path, what
):
    guilty, seen = data.read_corpus(corpus, "train", limit=8)[3].id, []
    forward = models.SpeechModel.forward

    def spoil(model, batch):
        seen.append(set(batch.utterances))
        bad = guilty in seen[-1] and len(seen) > 4  # in the second epoch
        loss = forward(model, batch)
        if bad and what == "loss":
            return loss * float("nan")
        if bad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(models.SpeechModel, "forward", spoil)
    with pytest.raises(cli.RunError) as error:
        train.train(small())
    step = len(logged(tmp_path)) + 1
    loss, norm = re.search(rf"step {step}: loss (\S+), gradient norm (\S+)\.", str(error.value)).groups()
    assert step in (3, 4) and np.isfinite(float(loss)) == (what == "gradient") and not np.isfinite(float(norm))
    named = set(str(error.value).split("one of: ")[1].split(", "))
    step_batches = seen[2 * (step - 1) : 2 * step]
    suspects = [batch for batch in step_batches if guilty in batch] if what == "loss" else step_batches
    assert named == set().union(*suspects) and "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000002.pt"]


def test_an_example_that_is_too_long_is_named_and_nothing_is_cut(small, corpus):
    first = data.read_corpus(corpus, "train", limit=8)
    with pytest.raises(cli.InputError) as error:
        train.train(small("--max-tokens", 60))
    longest = re.search(r"(\w+) \(MDD\) has (\d+)", str(error.value))
    assert longest[1] in [u.id for u in first] and int(longest[2]) > 60
    assert "are longer than --max-tokens 60" in str(error.value)


def test_a_held_out_example_that_is_too_long_is_found_before_training(monkeypatch, small, tmp_path):
    seen = []
    make = data.Examples.__getitem__
    monkeypatch.setattr(
        data.Examples, "__getitem__", lambda self, i: seen.append(self.utterances[i // 2].speaker) or make(self, i)
    )
    monkeypatch.setattr(train, "train_step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(small("--limit", 20, "--validation", 0.5))
    assert len(seen) >= 40 and len(set(seen)) == 2


def test_out_of_memory_says_micro_batch_longest_sequence_and_what_helps(monkeypatch, small):
    def forward(model, batch):
        seen.append(batch.input_ids.shape[1])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    seen = []
    monkeypatch.setattr(models.SpeechModel, "forward", forward)
    with pytest.raises(cli.RunError) as error:
        train.train(small("--micro-batch", 2))
    assert f"micro-batches of 2, longest sequence {seen[0]} tokens" in str(error.value)
    assert "--micro-batch" in str(error.value) and "--gradient-checkpointing" in str(error.value)


@pytest.mark.parametrize("strategy", models.STRATEGIES)
def test_what_saves_memory_does_not_change_the_step(small, tmp_path, strategy):
    same = ["--strategy", strategy, "--epsilon", 1e-4] + (["--dropout", 0] if strategy != "full" else [])
    numbers = []
    for i, change in enumerate(([], ["--micro-batch", 3], ["--gradient-checkpointing"])):
        train.train(small(*same, *change, "--output", tmp_path / str(i)))
        lines = (tmp_path / str(i) / "log.jsonl").read_text().splitlines()
        numbers.append([(line["loss"], line["gradient_norm"]) for line in map(json.loads, lines)])
    assert len(numbers[0]) == 4
    assert np.allclose(numbers[0], numbers[1], rtol=1e-5) and np.allclose(numbers[0], numbers[2], rtol=1e-5)


def test_gradient_checkpointing_computes_the_layers_twice(small, monkeypatch):
    calls, attention = [], sys.modules[models.Phi4MultimodalForCausalLM.__module__].Phi4MultimodalAttention
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    train.train(small("--epochs", 1, "--gradient-checkpointing"))
    layers, micro_batches = 3, 4
    assert len(calls) == 2 * layers * micro_batches


def test_a_folder_for_embeddings_that_cannot_be_written_is_named_before_anything_slow(small):
    with pytest.raises(
        cli.InputError, match="cannot write into .*cache: Not a directory; choose another --audio-cache"
    ):
        train.train(small("--audio-cache", Path(__file__) / "cache"))


def test_compiled_layers_and_worker_processes_leave_steps_and_validation_as_they_are(small, tmp_path):
    numbers = []
    for i, change in enumerate(([], ["--compile", "--workers", 2])):
        train.train(
            small(
                "--limit",
                20,
                "--validation",
                0.5,
                "--epochs",
                1,
                "--dropout",
                0,
                *change,
                "--output",
                tmp_path / str(i),
            )
        )
        lines = [
            json.loads(line)
            for name in ("log", "validation")
            for line in (tmp_path / str(i) / f"{name}.jsonl").read_text().splitlines()
        ]
        numbers.append([line["loss"] for line in lines])
    assert len(numbers[0]) == 3 and np.allclose(*numbers, rtol=1e-5)


def test_compiling_without_a_compiler_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    with pytest.raises(cli.InputError, match="--compile needs a C.. compiler where there is no GPU, and finds none"):
        settings(monkeypatch, "--compile")


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def test_no_speaker_is_trained_on_and_validated_on(utterances):
    for seed in range(5):
        chosen, held_out = data.hold_out_speakers(utterances, 0.3, seed)
        assert len({u.speaker for u in held_out}) == 1 and len(chosen) + len(held_out) == len(utterances)
        assert not {u.speaker for u in chosen} & {u.speaker for u in held_out}
    drawn = {data.hold_out_speakers(utterances, 0.1, seed)[1][0].speaker for seed in range(12)}
    assert len(drawn) > 1
    with pytest.raises(cli.InputError, match="--validation 0.9 of 4 speakers leaves none to train on"):
        data.hold_out_speakers(utterances, 0.9, 0)


def short_answers():
    data.MAX_NEW_TOKENS = 30


@pytest.fixture(scope="module")
def validated(checkpoint, corpus, tmp_path_factory):
    """A run of four epochs with one speaker of four held out."""
    folder = tmp_path_factory.mktemp("validated")
    arguments = ["--model", checkpoint, "--data", corpus, "--epochs", 4, "--learning-rate", 3e-3, "--rank", 4]
    arguments += ["--validation", 0.25, "--track", "tensorboard"]
    code, text = Process("train", arguments, folder, prepare=short_answers).wait()
    assert code == 0, text
    return folder, text


def test_every_epoch_is_validated_and_the_lowest_loss_marked_and_evaluated(validated):
    folder, text = validated
    lines = [json.loads(line) for line in (folder / "out" / "validation.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and losses[0] > losses[1]
    assert [line["best"] for line in lines] == [loss == min(losses) for loss in losses]
    assert "validation: 10 utterances of 1 speakers held out, 30 left to train on" in text
    assert f"epoch 1 on held-out speakers: loss {losses[0]:.3f}" in text and "the best so far" in text
    assert {"per", "wer", "accuracy_pcc", "detection_f1", "mdd_unparsed"} <= lines[0].keys()
    best = 1 + losses.index(min(losses))
    assert [path.name for path, _ in evaluate.adapter_folders(folder / "out", "best")] == [f"epoch-{best}"]


def test_the_validation_loss_is_that_of_the_held_out_examples(validated, checkpoint, corpus):
    folder, _ = validated
    line = json.loads((folder / "out" / "validation.jsonl").read_text().splitlines()[-1])
    _, held_out = data.hold_out_speakers(data.read_corpus(corpus, "train"), 0.25, 0)
    model = models.load_base(str(checkpoint), None, "float32", "sdpa", "merge")
    models.load_trained(model, folder / "out" / "epoch-4", "lora")
    examples = train.make_examples(held_out, model, 2048)
    with torch.no_grad():
        loss = sum(model(model.prepare([example])).item() for example in examples) / sum(
            len(e.answer_ids) for e in examples
        )
    assert line["loss"] == pytest.approx(loss, rel=1e-5)


def test_without_a_best_epoch_evaluate_says_what_writes_it(run):
    with pytest.raises(cli.InputError, match="--epochs best: .*validation.jsonl is missing.*--validation"):
        evaluate.adapter_folders(run[0] / "out", "best")


def test_patience_stops_early_also_when_resumed_and_the_best_epoch_stays(monkeypatch, small, tmp_path, capsys):
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.2, 5: 1.0}

    def validate(model, utterances, settings):
        return {"loss": losses[1 + len(list((tmp_path / "out").glob("epoch-*"))) - 1]} | dict.fromkeys(
            ("accuracy_pcc", "fluency_pcc", "prosodic_pcc", "total_pcc", "wer", "per")
        )

    monkeypatch.setattr(train, "validate", validate)
    arguments = ["--limit", 14, "--epochs", 5, "--validation", 0.5, "--patience", 2, "--rank", 2]
    train.train(small(*arguments))
    assert "no lower validation loss for 2 epochs: stopping early, after epoch 4" in capsys.readouterr().out
    train.train(small(*arguments, "--resume"))
    assert "stopping early, after epoch 4" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("epoch-*")) == [f"epoch-{i}" for i in range(1, 5)]
    assert evaluate.best_epoch(tmp_path / "out") == "2"


# ----------------------------------------------------------------------------------------------------------------------
# What a run shows


def test_tensorboard_shows_what_the_log_holds(validated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = validated
    events = EventAccumulator(str(folder / "out" / "tensorboard")).Reload()
    log = logged(folder)
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == [line["step"] for line in log]
    assert [event.value for event in shown] == pytest.approx([line["loss"] for line in log], rel=1e-6)
    assert [event.step for event in events.Scalars("validation_loss")] == [line["step"] for line in log]


def test_wandb_is_given_settings_and_every_step(monkeypatch, small, tmp_path):
    shown, options = [], {}

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            shown.append("finished")

        def log(self, numbers, step):
            shown.append((step, numbers["loss"]))

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **given: options.update(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.train(small("--track", "wandb", "--rank", 2))
    assert shown == [(line["step"], line["loss"]) for line in logged(tmp_path)] + ["finished"]
    assert options["config"]["rank"] == 2 and options["dir"] == tmp_path / "out"


def test_a_run_shows_its_curves_an_estimate_and_memory(validated):
    folder, text = validated
    assert (folder / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = logged(folder)
    assert len(log) == 4
    for line in log:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0.1 < line["memory_gb"] < 8
    assert "for the other" not in text  # four steps: nothing to estimate


def test_the_time_of_the_rest_is_estimated_after_ten_steps():
    assert (
        train.estimate(20.0, 224)
        == "10 steps took 20.0 s: about 0:07:28 (h:mm:ss) for the other 224, without validation"
    )
    assert "about 1 day, 3:46:40" in train.estimate(100.0, 10_000)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts


def test_a_run_prints_its_arithmetic_trained_groups_and_settings_before_it_starts(run):
    lines = run[1].stdout.splitlines()[:10]
    for expected in (
        "4 examples x 2 micro-batches = 8 a step; 20 examples = 2 steps an epoch",
        "trained: LoRA",
        "settings: data=",
        "10 utterances of 1 speakers",
    ):
        assert any(expected in line for line in lines), expected


def test_every_epoch_says_and_logs_how_far_the_adapter_has_moved(run):
    folder, result = run
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    ends = [line for line in log if "adapter_moved" in line]
    assert [line["step"] for line in ends] == [2, 4]
    assert 0 < ends[0]["adapter_moved"] < ends[1]["adapter_moved"] and ends[1]["control_tokens_moved"] > 0
    for line in ends:
        said = f"epoch {line['epoch']}: the adapter has moved its layers by {line['adapter_moved']:.2%}"
        assert said in result.stderr + result.stdout


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", 4],
        ["--speech-adapter", "none", "--rank", 4],
        ["--speech-adapter", "continue"],
        ["--strategy", "unfreeze", "--rank", 4, "--gradient-checkpointing"],
        ["--strategy", "full"],
        ["--quantize", "nf4", "--rank", 4],
        ["--quantize", "nf4", "--speech-adapter", "continue"],
    ],
)
def test_the_types_of_a_gpu_are_walked_on_a_cpu_from_training_to_the_table(
    monkeypatch, small, tmp_path, capsys, arguments
):
    """Frozen weights in bfloat16, trained ones in float32, autocast to bfloat16; validation, and evaluation after."""
    monkeypatch.setattr(runtime, "autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    monkeypatch.setattr(data, "MAX_NEW_TOKENS", 10)
    train.train(small(*arguments, "--dtype", "bfloat16", "--limit", 12, "--epochs", 1, "--validation", 0.5))
    out = tmp_path / "out"
    where = ["--adapter", str(out), "--limit", "2", "--max-new-tokens", "10", "--scoring", "greedy", "expected"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *where])
    evaluate.main()
    assert "this run, epoch-1, expected" in capsys.readouterr().out
    losses = [line["loss"] for line in logged(tmp_path)]
    assert losses and np.isfinite(losses).all() and (out / "predictions.jsonl").exists()
    (validated,) = map(json.loads, (out / "validation.jsonl").read_text().splitlines())
    assert np.isfinite(validated["loss"])
    saved = {}
    for file in (out / "epoch-1").glob("*.safetensors"):
        saved |= load_file(file)
    kept = torch.bfloat16 if "full" in arguments else torch.float32  # "full" is saved in the type it is used in
    assert {weight.dtype for weight in saved.values()} == {kept}


def test_the_same_seed_gives_the_same_weights(monkeypatch, checkpoint, corpus, tmp_path):
    def weights(name, seed):
        train.train(
            settings(
                monkeypatch,
                "--model",
                checkpoint,
                "--data",
                corpus,
                "--limit",
                6,
                "--epochs",
                1,
                "--rank",
                4,
                "--batch-size",
                4,
                "--accumulation",
                1,
                "--seed",
                seed,
                "--output",
                tmp_path / name,
            )
        )
        return load_file(tmp_path / name / "epoch-1" / "adapter_model.safetensors")

    one, again, other = weights("one", 1), weights("again", 1), weights("other", 2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_not_overwritten(run, checkpoint, corpus):
    code, text = Process("train", ["--model", checkpoint, "--data", corpus], run[0]).wait()
    assert code == 2 and "out/settings.json is there already: --resume goes on" in text


# ----------------------------------------------------------------------------------------------------------------------
# What cannot work together


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--strategy", "full", "--rank", 8], ["--strategy full", "--rank"]),
        (["--strategy", "full", "--alpha", 8, "--dropout", 0.1], ["--strategy full", "--alpha --dropout"]),
        (["--strategy", "full", "--speech-adapter", "continue"], ["--strategy full", "--speech-adapter continue"]),
        (["--speech-adapter", "continue", "--rank", 64], ["--speech-adapter continue", "--rank"]),
        (["--speech-adapter", "continue", "--alpha", 128], ["--speech-adapter continue", "--alpha"]),
        (["--speech-adapter", "continue", "--dropout", 0.05], ["--speech-adapter continue", "--dropout"]),
        (["--quantize", "nf4", "--strategy", "full"], ["--quantize nf4", "--strategy full"]),
        (["--quantize", "nf4", "--strategy", "unfreeze"], ["--quantize nf4", "--strategy unfreeze"]),
        (["--shard"], ["--shard", "--strategy full"]),
        (["--shard", "--strategy", "unfreeze"], ["--shard", "--strategy full", "--strategy unfreeze"]),
        (["--shard", "--strategy", "full"], ["--shard", "torchrun"]),
        (["--learning-rate", "1e300"], ["--learning-rate 1e+300", "above 1"]),
        (["--micro-batch", 65], ["--micro-batch 65", "--batch-size 8 x --accumulation 8"]),
        (["--patience", 2], ["--patience 2", "--validation"]),
        (
            ["--attention", "flash_attention_2", "--dtype", "float32"],
            ["--attention flash_attention_2", "--dtype float32"],
        ),
        (["--data", ROOT / "tests", "--data-revision", "x"], ["--data-revision x", f"--data {ROOT / 'tests'}"]),
        (["--model", ROOT / "tests", "--revision", "x"], ["--revision x", f"--model {ROOT / 'tests'}"]),
    ],
)
def test_settings_that_cannot_work_together_are_refused_and_both_named(monkeypatch, arguments, names):
    with pytest.raises(cli.InputError) as error:
        settings(monkeypatch, *arguments)
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, package",
    [
        (["--track", "tensorboard"], "tensorboard"),
        (["--track", "wandb"], "wandb"),
        (["--quantize", "nf4"], "bitsandbytes"),
        (["--attention", "flash_attention_2", "--dtype", "bfloat16"], "flash-attn"),
    ],
)
def test_an_option_whose_package_is_missing_says_how_to_install_it(monkeypatch, arguments, package):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.InputError, match=f"{' '.join(arguments[:2])} needs .*pip install {package}$"):
        settings(monkeypatch, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--strategy", "full", "--speech-adapter", "none"],
        ["--speech-adapter", "continue", "--strategy", "unfreeze"],
        ["--quantize", "nf4", "--speech-adapter", "continue", "--gradient-checkpointing"],
        ["--micro-batch", 64],
        ["--validation", 0.1, "--patience", 1],
    ],
)
def test_settings_that_work_together_are_taken(monkeypatch, arguments):
    chosen = settings(monkeypatch, *arguments)
    own = chosen.strategy == "full" or chosen.speech_adapter == "continue"
    assert (chosen.rank, chosen.alpha, chosen.dropout) == ((None,) * 3 if own else (64, 128, 0.05))


@pytest.mark.parametrize(
    "arguments, processes, message",
    [
        ([], 65, "a step of 64 examples (--batch-size 8 x --accumulation 8) cannot be shared by the 65 processes"),
        (["--shard", "--strategy", "full"], 3, "cannot be shared evenly (--shard) by the 3 processes"),
    ],
)
def test_a_step_that_the_processes_cannot_share_is_refused(monkeypatch, arguments, processes, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train.runtime, "processes", lambda: processes)
    with pytest.raises(cli.InputError, match=re.escape(message)):
        train.batch_arithmetic(5000, settings(monkeypatch, *arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "0 is not a whole number from 1 to 2,147,483,647"),
        (["--rank", "many"], "many is not a whole number from 1 to"),
        (["--dropout", "1.5"], "1.5 is not a fraction"),
        (["--learning-rate", "-1"], "-1 is not a positive number"),
        (["--learning-rate", "fast"], "fast is not a positive number"),
        (["--seed", "-1"], "-1 is not a whole number from 0 to 4,294,967,295"),
        (["--weight-decay", "nan"], "nan is not a fraction"),
        (["--validation", "1"], "1 is not a fraction"),
        (["--save-minutes", "0"], "0 is not a positive number"),
        (["--workers", "-1"], "-1 is not a whole number from 0 to"),
        (["--quantize", "int8"], "invalid choice: 'int8'"),
        (["--output", ""], "--output is empty"),
        (["--audio-cache="], "--audio-cache is empty"),
        (["--data", "a\nb"], "'a\\nb' is not UTF-8 or holds a control character"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(monkeypatch, arguments, message):
    with pytest.raises(cli.InputError, match=re.escape(message)):
        settings(monkeypatch, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "no/such/folder"], "corpus folder no/such/folder does not exist"),
        (["--model", ROOT / "tests"], "holds no checkpoint"),
        (["--output", Path(__file__) / "out"], "cannot write into"),
        (["--limit", 8, "--validation", 0.5], "--validation 0.5 of 1 speakers leaves none to train on"),
        (["--resume", "nowhere.pt"], "checkpoint nowhere.pt is missing; out has none"),
        (
            ["--model", "tiny/nowhere"],
            "model tiny/nowhere is not a folder here, revision refs/pr/70 of it is not whole",
        ),
    ],
)
def test_a_users_mistake_ends_with_2_and_one_line_before_anything_slow(
    arguments, message, checkpoint, corpus, tmp_path
):
    code, text = Process("train", ["--model", checkpoint, "--data", corpus, *arguments], tmp_path).wait()
    error = text.splitlines()[-1]
    assert code == 2 and error.startswith("train.py: error: ") and message in error and "\nmodel:" not in text
    assert not list(tmp_path.iterdir()) and "Traceback" not in text
