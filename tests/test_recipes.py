"""What the three recipes refuse: in one line, and before anything slow."""

import importlib
import itertools
import json
import math
import shutil
import sys

from conftest import fifo, sound, tone
import pytest
from safetensors.torch import load_file, save_file
import torch

from recipes import common, gold_transcripts, sign_language
from support import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with small models, glosses and sounds."""
    root = tmp_path_factory.mktemp("made")
    gold_transcripts.write_tiny(root / "wav2vec2", seed=0)
    sign_language.write_synthetic(root / "glosses", 0, {"train": (2, 1), "dev": (1, 1)})
    student = sign_language.Student(sign_language.SYNTHETIC, [*sign_language.SPECIAL, "WIND"], [])
    sign_language.save(root / "other.safetensors", student, {"glosses": "filtered"})
    record = {"glosses": "filtered", "epoch": 1, "dev_wer": 1.0}
    sign_language.save(root / "best.safetensors", student, record)
    with torch.no_grad():
        student.output.weight[2, 3] = math.nan
    sign_language.save(root / "nan.safetensors", student, record)
    (root / "sounds").mkdir()
    (root / "sounds" / "short.wav").write_bytes(sound(tone(0.5)))
    (root / "low.wav").write_bytes(sound(tone(0.5, 8000), 8000))
    (root / "gold.jsonl").write_text("somebody's")
    return root


def not_a_number(root):
    weights = load_file(root / "wav2vec2" / "model.safetensors")
    weights["lm_head.weight"][3, 5] = math.nan
    save_file(weights, root / "wav2vec2" / "model.safetensors", metadata={"format": "pt"})


def large_id(root):
    path = root / "wav2vec2" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"E": 5000}))


def annotated(lines):
    return lambda root: (root / "glosses/train.SI5.corpus.csv").write_text("id|folder|signer|annotation\n" + lines)


GOLD = "gold_transcripts --data CORPUS --oracle --recogniser wav2vec2"
SIGNS, SCORED = "sign_language --data glosses", "sign_language --data glosses --evaluate"
CLIPS = "speech_detection --data CORPUS --train-clips 48 --test-clips 48"
REFUSED = [  # what becomes of the folder, the command line, and what is said
    (large_id, GOLD, "has the id 5,000, its weights end with 31"),
    (not_a_number, GOLD, "lm_head.weight holds values that are not finite"),
    (lambda root: fifo(root / "wav2vec2" / "model.safetensors"), GOLD, "is not a regular file"),
    (None, f"{GOLD} --output .", "says that recipes.gold_transcripts wrote it"),
    (None, "gold_transcripts --audio-dir sounds --oracle", "--audio-dir has none"),
    (None, f"{SCORED} other.safetensors", "training.epoch is missing"),
    (None, f"{SCORED} nan.safetensors", "output.weight holds values that are not finite"),
    (lambda root: fifo(root / "best.safetensors"), f"{SCORED} best.safetensors", "missing, or not a regular file"),
    (None, f"{SCORED} best.safetensors --beam-width 1000000000", "less than or equal to 100"),
    (None, f"{SCORED} best.safetensors --glosses all", "--evaluate does not use --glosses"),
    (
        lambda root: (root / "results.json").touch(),
        f"{SCORED} best.safetensors --output .",
        "recipes.sign_language wrote",
    ),
    (annotated("a|b|S\n"), SIGNS, "needs 4 fields and an id in line 2"),
    (annotated("train-0000|b|S|<blank> AB\n"), SIGNS, "<blank> is no gloss"),
    (annotated("train-0000|b|S|AB\n" * 2), SIGNS, "its id stands in several lines"),
    (lambda root: (root / "glosses/features.json").write_text('{"pose": 9}'), SIGNS, "should have at least 4 items"),
    (None, "speech_detection --trained . --audio low.wav", "8,000 Hz is below 16,000 Hz"),
    (None, f"{CLIPS} --sounds sounds --model tiny --train all", "short.wav: shorter than the longest clip"),
    (None, f"{CLIPS} --train-clips 100", "use a multiple of 24"),
    (None, f"{CLIPS} --train all --quantize nf4", "--quantize nf4 freezes"),
]


@pytest.mark.parametrize("spoil, line, message", REFUSED)
def test_what_cannot_be_used_is_an_error(spoil, line, message, made, corpus, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(made, tmp_path / "made")
    if spoil:
        spoil(root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", line.replace("CORPUS", str(corpus)).split())
    recipe = importlib.import_module(f"recipes.{sys.argv[0]}")
    with pytest.raises(SystemExit) as ended:
        cli.run_script(sys.argv[0], recipe.main)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and message in said, said
    assert (root / "gold.jsonl").read_text() == "somebody's"


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples():
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(cli.RunError, match="step 7.*id0, id1.*--learning-rate"):
        common.update(torch.optim.SGD([weight]), [(["id0", "id1"], (math.nan * weight).sum())], 1.0, 1.0, 7)
    assert weight.item() == 1


@pytest.mark.parametrize("seed", range(4))
def test_ctc_sums_over_all_alignments_in_loss_and_wide_beam_and_greedy_takes_one(seed):
    log_probs = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(1)
    totals, likeliest = {}, (0, ())  # of each text, one alignment by one; probability and text of the likeliest one
    for path in itertools.product(range(4), repeat=5):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
        probability = math.exp(sum(log_probs[t, symbol] for t, symbol in enumerate(path)))
        totals[text], likeliest = totals.get(text, 0) + probability, max(likeliest, (probability, text))
    for text, probability in totals.items():
        assert gold_transcripts.ctc_loss(log_probs, list(text), 0).item() == pytest.approx(-math.log(probability))
    texts = (text for length in range(6) for text in itertools.product(range(1, 4), repeat=length))
    assert totals.keys() == {text for text in texts if common.frames_needed(text) <= 5}
    assert tuple(sign_language.greedy_search(log_probs)) == likeliest[1]
    assert tuple(sign_language.beam_search(log_probs, 10_000)) == max(totals, key=totals.get)
