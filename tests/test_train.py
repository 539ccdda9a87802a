import json
from pathlib import Path
import re
import sys

from conftest import ROOT, read_lines, settings
import numpy as np
from peft import get_peft_model_state_dict
from processes import Process
import pytest
from safetensors.torch import load_file
import torch

from bench import train_step
import data
import evaluate
import model as models
import prompts
from support import cli, pretrained
from support import run as runs
import train

OUT = Path("out")
SLOW = pytest.mark.slow


def weights_of(folder):
    """All that an adapter's folder holds, {name: tensor}."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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
    chosen = settings(monkeypatch)
    assert chosen.learning_rate == 2e-5 and train.batch_arithmetic(5000, chosen) == (64, 78)
    printed = capsys.readouterr().out
    assert "8 examples x 8 micro-batches = 64 a step; 5,000 examples = 78 steps an epoch" in printed
    assert "the 8 examples over are left out of an epoch" in printed
    assert train.batch_arithmetic(20, chosen) == (20, 1)  # trained on whole
    assert "left out" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers.Trainer


@pytest.mark.parametrize("strategy", ["lora", pytest.param("unfreeze", marks=SLOW)])
def test_one_optimiser_step_equals_transformers_trainer(monkeypatch, where, checkpoint, corpus, tmp_path, strategy):
    """The same 64 examples, no dropout: Trainer takes both tasks in a micro-batch, ours are sorted by length."""
    how = ["--speech-adapter", "continue", "--strategy", strategy]
    train.train(settings(monkeypatch, *where, *how, *"--learning-rate 1e-3 --limit 32 --epochs 1".split()))
    (line,), ours = read_lines(OUT / "log.jsonl"), weights_of(OUT / "epoch-1")
    assert line["learning_rate"] == 1e-3

    model = models.load_base(pretrained.find(checkpoint), "float32", "sdpa", "continue")
    assert models.add_adapter(model, None, None, None).lora_dropout == 0
    models.set_trainable(model, strategy)
    utterances = data.read_corpus(corpus, "train", limit=32)
    examples = data.make_examples(utterances, model.tokenizer, model.audio_id)

    def trained():
        return get_peft_model_state_dict(model.network) | models._outside_adapter(model, strategy)

    before = {key: value.detach().clone() for key, value in trained().items()}
    monkeypatch.setattr(train_step, "RATE", 1e-3)
    ((step,), theirs) = train_step.trainer(model, [examples], tmp_path / "theirs", unpadded=True), trained()

    for key in ("loss", "gradient_norm"):
        assert line[key] == pytest.approx(step[key], rel=1e-4)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "audio_embed" in key and "k_proj.bias" in key:
            continue  # its gradient is zero but for rounding, of which Adam makes whole steps
        change = (value - before[key]).norm()
        assert change > 0 and (ours[key] - value).norm() / change < 1e-2, key
        assert (ours[key] - value).norm() / value.norm() < 1e-4, key


def test_a_gradient_above_the_limit_is_clipped_to_it(monkeypatch, short_run):
    norms = []

    class Recorder(torch.optim.AdamW):
        def step(self):
            norms.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    short_run(monkeypatch, "--epochs", 1, "--clip", 0.01)
    assert min(line["gradient_norm"] for line in read_lines(OUT / "log.jsonl")) > 0.02
    assert [norm.item() for norm in norms] == pytest.approx([0.01] * 2, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Guards


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update_and_names_utterances(monkeypatch, short_run, corpus, what):
    guilty, seen = data.read_corpus(corpus, "train", limit=8)[3].id, []
    loss_of = models.SpeechModel.loss

    def spoil(model, batch, audio):
        seen.append({utterance.id for utterance in batch.utterances})
        bad = guilty in seen[-1] and len(seen) > 4  # in the second epoch
        loss = loss_of(model, batch, audio)
        if bad and what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss * float("nan") if bad and what == "loss" else loss

    monkeypatch.setattr(models.SpeechModel, "loss", spoil)
    with pytest.raises(cli.RunError, match="^[^\n]*$") as error:
        short_run(monkeypatch)
    step = len(read_lines(OUT / "log.jsonl")) + 1
    loss, norm = re.search(r"loss (\S+), gradient norm (\S+):", str(error.value)).groups()
    assert step in (3, 4) and np.isfinite(float(loss)) == (what == "gradient") and not np.isfinite(float(norm))
    step_batches = seen[2 * (step - 1) : 2 * step]
    suspects = [batch for batch in step_batches if guilty in batch] if what == "loss" else step_batches
    assert set(str(error.value).split("one of: ")[1].split(", ")) == set().union(*suspects)
    assert max(path.name for path in (OUT / "checkpoints").iterdir()) == f"step-0000000{step - 1}.pt"


def test_out_of_memory_says_micro_batch_longest_sequence_and_what_helps(monkeypatch, short_run):
    seen = []

    def forward(model, batch, audio):
        seen.append(batch.input_ids.shape[1])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(models.SpeechModel, "loss", forward)
    with pytest.raises(cli.RunError) as error:
        short_run(monkeypatch, "--micro-batch", 2)
    for part in ("micro-batches of 2", f"{seen[0]} tokens", "--micro-batch", "--gradient-checkpointing"):
        assert part in str(error.value)


def test_what_saves_memory_does_not_change_the_step(monkeypatch, short_run):
    """And gradient checkpointing does compute the layers twice."""
    attention, calls = sys.modules[models.Phi4MultimodalForCausalLM.__module__].Phi4MultimodalAttention, []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    same = ["--epsilon", 1e-4, "--dropout", 0]
    numbers, counts = [], []
    for i, change in enumerate(([], ["--micro-batch", 3], ["--gradient-checkpointing"])):
        calls.clear()
        short_run(monkeypatch, "--epochs", 1, *same, *change, "--output", i)
        counts.append(len(calls))
        numbers.append([(line["loss"], line["gradient_norm"]) for line in read_lines(Path(str(i)) / "log.jsonl")])
    assert len(numbers[0]) == 2 and counts[2] == 2 * counts[0]
    assert np.allclose(numbers[0], numbers[1], rtol=1e-5) and np.allclose(numbers[0], numbers[2], rtol=1e-5)


@pytest.mark.slow
def test_compiled_layers_leave_steps_and_validation_as_they_are(monkeypatch, short_run):
    same, numbers = "--limit 20 --validation 0.5 --epochs 1 --dropout 0".split(), []
    for i, change in enumerate(([], ["--compile"])):
        short_run(monkeypatch, *same, *change, "--output", i)
        ((_, training),) = runs.adapters(Path(str(i)), "all")
        numbers.append([line["loss"] for line in read_lines(Path(str(i)) / "log.jsonl")] + [training.validation_loss])
    assert len(numbers[0]) == 3 and np.allclose(*numbers, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def test_no_speaker_is_trained_on_and_validated_on(utterances):
    for seed in range(5):
        chosen, held_out = data.hold_out_speakers(utterances, 0.3, seed)
        assert len({u.speaker for u in held_out}) == 1 and len(chosen) + len(held_out) == len(utterances)
        assert not {u.speaker for u in chosen} & {u.speaker for u in held_out}
    assert len({data.hold_out_speakers(utterances, 0.1, seed)[1][0].speaker for seed in range(12)}) > 1
    with pytest.raises(cli.InputError, match="--validation 0.9 of 4 speakers"):
        data.hold_out_speakers(utterances, 0.9, 0)


@pytest.fixture(scope="module")
def validated(where, tmp_path_factory):
    """A run of four epochs with one speaker of four held out: its --output, and what it printed."""
    folder = tmp_path_factory.mktemp("validated")
    sizes = "--epochs 4 --learning-rate 3e-3 --rank 4 --validation 0.25 --track tensorboard".split()
    code, text = Process("train", [*where, *sizes], folder).wait()
    assert code == 0, text
    return folder / "out", text


def test_every_epoch_is_validated_on_held_out_speakers_and_the_lowest_loss_is_best(validated, checkpoint, corpus):
    out, text = validated
    losses = [training.validation_loss for _, training in runs.adapters(out, "all")]
    assert len(losses) == 4 and losses[0] > losses[1]
    assert "10 utterances of 1 speakers held out, 30 left" in text and f"loss {losses[0]:.3f}" in text
    assert [path.name for path, _ in runs.adapters(out, "best")] == [f"epoch-{1 + losses.index(min(losses))}"]

    _, held_out = data.hold_out_speakers(data.read_corpus(corpus, "train"), 0.25, 0)
    model = models.load_base(pretrained.find(checkpoint), "float32", "sdpa", "merge")
    models.load_trained(model, out / "epoch-4", "lora")
    examples = data.make_examples(held_out, model.tokenizer, model.audio_id)
    with torch.no_grad():
        loss = sum(model.loss(data.collate([e], model.pad_id), model.hear([e.utterance])).item() for e in examples)
    assert losses[-1] == pytest.approx(loss / sum(len(example.answer_ids) for example in examples), rel=1e-5)


def test_patience_stops_early_also_when_resumed_and_the_best_epoch_stays(monkeypatch, short_run, capsys):
    losses = iter([3.0, 2.0, float("nan"), 2.2])  # nan ends no run; resumed, no epoch is left to validate
    monkeypatch.setattr(train, "validate", lambda *_: next(losses))
    arguments = "--limit 14 --epochs 5 --validation 0.5 --patience 2".split()
    for more in ([], ["--resume"]):
        short_run(monkeypatch, *arguments, *more)
        assert "stopping early, after epoch 4" in capsys.readouterr().out
    assert sorted(path.name for path in OUT.glob("epoch-*")) == [f"epoch-{i}" for i in range(1, 5)]
    assert [path.name for path, _ in runs.adapters(OUT, "best")] == ["epoch-2"]


def test_without_validation_no_epoch_is_the_best(run):
    with pytest.raises(cli.InputError, match="--epochs best: .*were not validated; add --validation"):
        runs.adapters(run[0] / "out", "best")


# ----------------------------------------------------------------------------------------------------------------------
# What a run shows


def test_tensorboard_shows_what_the_log_holds_and_curves_memory_and_speed_are_there(validated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = validated
    events, log = EventAccumulator(str(out / "tensorboard")).Reload(), read_lines(out / "log.jsonl")
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == [line["step"] for line in log] == [1, 2, 3, 4]
    assert [event.value for event in shown] == pytest.approx([line["loss"] for line in log], rel=1e-6)
    assert [event.step for event in events.Scalars("validation_loss")] == [line["step"] for line in log]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for line in log:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0.1 < line["memory_gb"] < 8


def test_a_run_prints_its_arithmetic_trained_groups_and_settings_and_logs_every_step(run):
    out, text = run[0] / "out", run[1].stdout + run[1].stderr
    for expected in ("= 8 a step; 20 examples = 2 steps", "trained: LoRA", "10 utterances of 1 "):
        assert expected in text
    log = read_lines(out / "log.jsonl")
    assert [(line["step"], line["epoch"]) for line in log] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all(0 <= line["padding"] < 0.5 and line["supervised_tokens"] < line["tokens"] for line in log)
    moved = [float(share) for share in re.findall(r"moved its layers by ([\d.]+)%", text)]
    assert len(moved) == 2 and 0 < moved[0] < moved[1]
    for epoch in (1, 2):
        saved = json.loads((out / f"epoch-{epoch}" / "settings.json").read_text())
        assert saved["epoch"] == epoch and saved["rank"] == 4 and saved["versions"]["torch"] == torch.__version__
        assert saved["prompts"] == prompts.digest()


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--speech-adapter continue",
        pytest.param("--strategy unfreeze --gradient-checkpointing", marks=SLOW),
        pytest.param("--quantize nf4 --strategy unfreeze", marks=SLOW),
        pytest.param("--quantize nf4 --speech-adapter continue", marks=SLOW),
    ],
)
def test_the_types_of_a_gpu_are_walked_on_a_cpu_from_training_to_the_table(monkeypatch, short_run, capsys, arguments):
    """Frozen weights in bfloat16, trained ones in float32, autocast to bfloat16; validation, and evaluation after."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: autocast("cpu", dtype=torch.bfloat16))
    short_run(monkeypatch, *arguments.split(), *"--dtype bfloat16 --limit 12 --epochs 1 --validation 0.5".split())
    how = "--adapter out --limit 2 --max-new-tokens 10 --scoring greedy expected".split()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *how])
    evaluate.main()
    assert "this run, epoch-1, expected" in capsys.readouterr().out
    ((_, training),) = runs.adapters(OUT, "all")
    losses = [line["loss"] for line in read_lines(OUT / "log.jsonl")] + [training.validation_loss]
    assert len(losses) > 1 and np.isfinite(losses).all() and (OUT / "predictions.jsonl").exists()
    assert {weight.dtype for weight in weights_of(OUT / "epoch-1").values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# What cannot work


TESTS = str(ROOT / "tests")


@pytest.mark.parametrize(
    "arguments, names",
    [
        ("--speech-adapter continue --rank 64", ["--rank"]),
        ("--speech-adapter continue --dropout 0.05", ["--dropout"]),
        ("--patience 2", ["--validation"]),
        ("--attention flash_attention_2 --dtype float32", ["--dtype float32"]),
        (f"--data-revision x --data {TESTS}", [TESTS]),
        (f"--revision x --model {TESTS}", [TESTS]),
        ("--learning-rate 1e300", ["1e+300"]),
        ("--weight-decay nan", ["nan"]),
        ("--quantize int8", ["int8"]),
        ("--output=", ["empty"]),
        ("--data a\udcff", ["'a\\udcff' is not UTF-8"]),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_names_and_values(monkeypatch, arguments, names):
    with pytest.raises(cli.InputError, match="^[^\n]*$") as error:
        settings(monkeypatch, *arguments.split(" "))
    flag = "" if "\udcff" in arguments else arguments.split(" ")[0].rstrip("=")
    assert all(name in str(error.value) for name in (flag, *names))


def test_what_only_this_machine_lacks_is_said_before_anything_slow(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.InputError, match="pip install bitsandbytes"):
        settings(monkeypatch, "--quantize", "nf4")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(cli.InputError, match="--compile needs a C"):
        settings(monkeypatch, "--compile")
    monkeypatch.setattr(train.processes, "count", lambda: 65)
    with pytest.raises(cli.InputError, match="--batch-size 8 x --accumulation 8.* 65 processes"):
        train.batch_arithmetic(5000, settings(monkeypatch, "--speech-adapter", "continue"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "no/such/folder"], "corpus folder no/such/folder does not exist"),
        (["--model", TESTS], "config.json cannot be read: No such file"),
    ],
)
def test_a_users_mistake_ends_with_2_and_one_line_before_anything_slow(arguments, message, where, tmp_path):
    code, text = Process("train", [*where, *arguments], tmp_path).wait()
    error = text.splitlines()[-1]
    assert code == 2 and error.startswith("train.py: error: ") and message in error and "\nmodel:" not in text
    assert not list(tmp_path.glob("out*")) and "Traceback" not in text
