"""The sign language recipe: what its first authors' version got silently wrong, and what a copy could get wrong."""

from contextlib import redirect_stdout
import io
import json
import math
from pathlib import Path
import shutil

from conftest import fifo, read_lines
import numpy as np
import pytest
import torch
from torch import nn

import metrics
from recipes import common
from recipes import sign_language as sign
from support import cli

GROUPS = sign.SYNTHETIC
WIDTH = sum(GROUPS.values())
VOCABULARY = [*sign.SPECIAL, *sign.SYNTHETIC_GLOSSES]
SPLITS = {"train": (12, 2), "dev": (4, 1), "test": (4, 1)}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("glosses") / "data"
    sign.write_synthetic(path, 0, SPLITS)
    return path


@pytest.fixture
def own_copy(folder, tmp_path):
    """A data folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "data")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a run, and what it printed."""
    output = tmp_path_factory.mktemp("run")
    with redirect_stdout(io.StringIO()) as said:
        sign.train(sign.Settings(data=folder, epochs=2, warmup=1, output=output))
    return output, said.getvalue()


def started(frames, dropout=0.3, spread=1.0):
    """An untrained small model whose batch norms have statistics and weights that matter."""
    model = sign.Student(GROUPS, VOCABULARY, dropout=dropout)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0  # the statistics of one batch, so that signals do not fade
            nn.init.normal_(module.weight, 1, 0.3 * spread)
            nn.init.normal_(module.bias, 0, spread)
    model.train()(torch.randn(8, frames, WIDTH), torch.full((8,), frames))
    return model.eval()


def padded(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def test_parameters_of_every_part_are_those_of_the_document():
    encoders, blocks = 13_638 + 33_023 + 1_079_906 + 12_580_510, 516 + 3_432 + 4_888 + 11_816 + 50_540 + 19_086
    expected = {"encoders": encoders, "stem": 18_464, "blocks": blocks, "upsample": 24_960, "projection": 49_536}
    expected |= {"dropout": 0, "lstm": 264_192, "output": 257 * 101}
    parts = dict(sign.Student(sign.FEATURES, ["gloss"] * 101).named_children())
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == expected


def locality(model):
    """How much more the output's first quarter changes than its last when the first quarter of the frames does."""
    with torch.no_grad():
        frames = torch.randn(1, 120, WIDTH)
        other = frames.clone()
        other[:, :30] = torch.randn(1, 30, WIDTH)
        lengths = torch.tensor([120])
        change = (model(frames, lengths) - model(other, lengths)).abs().mean(dim=(1, 2))
        return change[:30].mean() / change[-30:].mean()


def test_the_output_changes_where_the_frames_change_and_not_in_a_collapsed_model():
    model = started(120, dropout=0.0, spread=0.0)
    assert locality(model) > 10
    model.projection.register_forward_hook(lambda _, x, y: y.mean(dim=2, keepdim=True).expand_as(y))
    assert locality(model) < 1.5


def test_padding_changes_no_output():
    model, rows = started(60), [torch.randn(frames, WIDTH) for frames in (61, 58, 44, 23, 6)]
    with torch.no_grad():
        together = model(*padded(rows))
        for i, row in enumerate(rows):
            alone = model(row[None], torch.tensor([len(row)]))[:, 0]
            assert torch.allclose(together[: len(row), i], alone, atol=1e-5)
        features, lengths = padded(rows[:2])
        features[1, 58:] = 100 * torch.randn(3, WIDTH)  # what stands in padded frames
        assert torch.allclose(model(features, lengths)[:58, 1], together[:58, 1], atol=1e-5)


def test_masked_batch_norm_equals_pytorchs_without_the_padding():
    masked, plain = sign.ConvNorm(nn.Conv1d(4, 4, 1, bias=False)), nn.BatchNorm1d(4)
    nn.init.dirac_(masked.conv.weight)
    x, mask = torch.randn(2, 4, 6), torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    found, expected = masked(x, mask), plain(torch.cat([x[0], x[1, :, :2]], dim=1)[None])[0]
    torch.testing.assert_close(torch.cat([found[0], found[1, :, :2]], dim=1), expected)
    assert not found[1, :, 2:].any()
    torch.testing.assert_close(masked.norm.state_dict(), plain.state_dict())


def test_an_error_rate_above_one_stays_above_one():
    samples = [sign.Sample(str(i), "A", ("X",), None, 9) for i in range(3)]
    result = sign.wer_with_interval([["X"]] * 3, [["Y", "Z", "Y"], ["X"], ["Y", "Y"]], samples, 0)
    assert result["wer"] == pytest.approx(5 / 3) and result["ins"] == pytest.approx(1) and result["high"] > 1.5
    assert result["resampled"] == "sequences"  # of a single signer


def test_statistics_are_those_of_all_train_frames(folder):
    samples = sign.read_split(folder, "train", GROUPS, "filtered")
    frames = np.concatenate([np.load(s.path)["features"] for s in samples])
    mean, std, missing = sign.feature_statistics(samples, GROUPS)
    assert np.allclose(mean, frames.mean(axis=0), atol=1e-5) and np.allclose(std, frames.std(axis=0), atol=1e-4)
    hands = frames[:, 9:21]
    lost = (hands[:, :6] == 0).all(axis=1) | (hands[:, 6:] == 0).all(axis=1)
    assert missing["hands"] == pytest.approx(lost.mean()) and lost.mean() > 0 == missing["face"]


def test_augmentation_differs_and_constant_features_do_not_blow_up(own_copy):
    for path in own_copy.glob("train/*.npz"):
        frames = np.load(path)["features"]
        frames[:, 30] = 0.7
        np.savez(path, features=frames)
    samples = sign.read_split(own_copy, "train", GROUPS, "filtered")
    student = sign.Student(GROUPS, VOCABULARY)
    student.mean, student.std = map(torch.from_numpy, sign.feature_statistics(samples, GROUPS)[:2])
    frames[:, 30] += 1e-4  # rounding, or another recording
    np.savez(path, features=frames)
    drawn = [sign.make_batch(samples, student, np.random.default_rng(seed)).features for seed in range(5)]
    assert len({(*features.shape, features.sum().item()) for features in drawn}) == 5
    for features in drawn:
        assert features[..., 30].abs().max() < 1 and features.abs().max() < 20


def test_a_run_writes_what_its_docstring_says(trained):
    output, said = trained
    steps, epochs = (read_lines(output / name) for name in ("log.jsonl", "validation.jsonl"))
    assert [line["epoch"] for line in steps] == [1, 1, 1, 2, 2, 2] and [line["epoch"] for line in epochs] == [1, 2]
    assert [line["learning_rate"] for line in steps] == [common.learning_rate(step, 6, 3e-4, 3) for step in range(6)]
    assert "signers that training has too:" in said and "508,217 parameters, 1.94 MiB" in said
    student, training = sign.load(output / "best.safetensors")
    best = min(epochs, key=lambda line: (line["wer"], line["loss"]))
    assert (training.epoch, training.dev_wer) == (best["epoch"], best["wer"])
    assert student.vocabulary[:2] == list(sign.SPECIAL) and list(student.groups.items()) == list(GROUPS.items())


def test_a_checkpoint_scores_a_split_as_the_training_did(trained, folder):
    best, results = trained[0] / "best.safetensors", []
    for size in (1, 4):
        sign.evaluate(sign.Settings(data=folder, evaluate=best, split="dev", batch_size=size, output=Path("dev")))
        results.append(json.loads(Path("dev/results.json").read_text()))
    _, training = sign.load(best)
    assert results[0]["greedy"]["wer"] == pytest.approx(training.dev_wer)
    assert results[0]["predictions"] == results[1]["predictions"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)  # each row has its own glosses
    references, read = ([p[key] for p in results[0]["predictions"]] for key in ("reference", "beam"))
    assert results[0]["beam"]["wer"] == pytest.approx(metrics.error_rate(references, read))


def test_hands_and_face_in_each_others_columns_are_refused(own_copy):
    (own_copy / "features.json").write_text(json.dumps({"pose": 9, "face": 12, "hands": 30, "temporal": 153}))
    with pytest.raises(cli.InputError, match="hands are missing in 0.0% of the frames"):
        sign.train(sign.Settings(data=own_copy))


def test_unknown_and_impossible_are_counted_and_scored(trained, own_copy):
    glosses = ("GEWITTER\u2028REGEN", "REGEN " * 200, "REGEN", "REGEN")
    lines = ["id|signer|annotation", *(f"test-{i:04d}|S|{text}" for i, text in enumerate(glosses))]
    (own_copy / "test.SI5.corpus.csv").write_text("\n".join(lines))
    sign.evaluate(sign.Settings(data=own_copy, evaluate=trained[0] / "best.safetensors"))
    results = json.loads(Path("out-sign/results.json").read_text())
    assert results["impossible"] == ["test-0001"] and results["unknown_glosses"] == 1
    assert sign.Student(GROUPS, VOCABULARY).encode(["GEWITTER", "", "REGEN"]) == [1, 1, VOCABULARY.index("REGEN")]
    assert results["predictions"][0]["reference"] == ["GEWITTER", "REGEN"] and math.isfinite(results["loss"])


BAD = {  # what becomes of a feature file, and the reason that is given
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a readable"),
    "fifo": (lambda path: fifo(path.parent.parent / f"{path.stem}.npy") and path.unlink(), "not a regular file"),
    "shape": (lambda path: np.savez(path, features=np.zeros((20, 7))), "[20, 7] instead"),
    "nan": (lambda path: np.savez(path, features=np.full((20, WIDTH), np.nan)), "not finite"),
    "short": (lambda path: np.savez(path, features=np.zeros((3, WIDTH))), "fewer than 5"),
}


def test_every_bad_sequence_is_named(own_copy):
    for i, (spoil, _) in enumerate(BAD.values()):
        spoil(own_copy / "train" / f"train-{i:04d}.npz")
    with pytest.raises(cli.InputError, match="^5 of 12 sequences") as error:
        sign.read_split(own_copy, "train", GROUPS, "filtered")
    for i, (line, (_, reason)) in enumerate(zip(str(error.value).split("\n")[1:], BAD.values(), strict=True)):
        assert f"train-{i:04d}" in line and reason in line
