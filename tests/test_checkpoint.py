"""What is assumed of the real checkpoint (docs/checkpoint.md), each assumption against files that break it."""

import json
import os
import pickle
import re
import shutil

from conftest import Payload, call, copy_of, fifo, settings
import pytest
from safetensors.torch import load_file, save_file
import torch

from analysis import golden
import data
import evaluate
import model as models
from support import cli, pretrained
import tiny
import train

SIZES = "--limit 8 --epochs 1 --batch-size 4 --accumulation 2 --learning-rate 3e-3".split()


def load(folder, speech_adapter="merge"):
    return models.load_base(pretrained.find(folder), "float32", "sdpa", speech_adapter)


@pytest.fixture(scope="module")
def bare(checkpoint, tmp_path_factory):
    """The checkpoint of conftest with the names that transformers' converter writes."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("bare") / "model")
    path = folder / pretrained.SPEECH_ADAPTER / pretrained.ADAPTER_FILE
    named = {name.removeprefix("base_model.model."): weight for name, weight in load_file(path).items()}
    save_file(named, path, {"format": "pt"})
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The speech adapter


def test_the_speech_adapter_lists_suffixes_as_microsofts_does(checkpoint):
    config = json.loads((checkpoint / pretrained.SPEECH_ADAPTER / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.parametrize("way", ["merge", "continue"])
def test_training_and_evaluation_are_the_same_from_both_forms_of_names(way, checkpoint, bare, corpus, monkeypatch):
    results = []
    for name, folder in (("prefixed", checkpoint), ("bare", bare)):
        rank = ["--rank", 4, "--alpha", 8] if way == "merge" else []
        where = ["--model", folder, "--data", corpus, "--speech-adapter", way, "--output", name]
        train.train(settings(monkeypatch, *where, *SIZES, *rank))
        call(monkeypatch, evaluate, *f"--adapter {name} --limit 2 --max-new-tokens 8".split())
        weights = load_file(f"{name}/epoch-1/adapter_model.safetensors")
        results.append((weights, open(f"{name}/predictions.jsonl").read()))
    (ours, our_answers), (theirs, their_answers) = results
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert our_answers == their_answers


# ----------------------------------------------------------------------------------------------------------------------
# Files and configurations


def pickled(name):
    def damage(folder):
        (folder / f"{name}model.safetensors").unlink()
        (folder / (f"{name}model.bin" if name else "pytorch_model.bin")).write_bytes(pickle.dumps(Payload()))

    return damage


def changed(name, **values):
    def damage(folder):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


EXTRA = "model.layers.0.self_attn.q_proj.weight"


def one_weight_more(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {EXTRA: torch.ones(2, 2)}, path, {"format": "pt"})


def silent_speech_adapter(folder):
    path = folder / pretrained.SPEECH_ADAPTER / pretrained.ADAPTER_FILE
    weights = {name: weight * ("lora_A" in name) for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (changed("config", model_type="llama"), "config.json: model_type 'llama'"),
        (changed("config", audio_config={"chunk_size": 18}), "config.json: audio_config.chunk_size 18"),
        (changed("config", audio_config={"time_reduction": 4}), "config.json: audio_config.time_reduction 4"),
        (changed("preprocessor_config", mel_max_frequency=8000.0), "preprocessor_config.json: mel_max_frequency 8000"),
        (changed("preprocessor_config", preemphasis=0.0), "preprocessor_config.json: preemphasis 0"),
        (changed("preprocessor_config", hop_length=80), "preprocessor_config.json: hop_length 80"),
        (lambda folder: fifo(folder / "model.safetensors"), "model.safetensors is not a regular file"),
        (silent_speech_adapter, "the speech adapter changes nothing: .*o_proj"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json cannot be read"),
        (one_weight_more, f"1 weights are not those of this model, such as: {EXTRA} is unexpected"),
        (pickled(""), "model '.*copy' cannot be loaded"),
        (pickled(f"{pretrained.SPEECH_ADAPTER}/adapter_"), "adapter .*copy/speech-lora cannot be loaded"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_with_what_is_wrong(checkpoint, tmp_path, damage, message):
    folder = copy_of(checkpoint, tmp_path)
    damage(folder)
    with pytest.raises(cli.InputError, match=f"^.*{message}.*$") as error:
        load(folder)
    assert "\n" not in str(error.value) and not os.path.exists("executed")


def test_more_tokens_than_the_usual_positions_stop_training_and_evaluation(where, monkeypatch):
    usual = tiny.POSITIONS - data.MAX_NEW_TOKENS
    assert pretrained.find(where[1], None, tiny.POSITIONS)
    with pytest.raises(cli.InputError, match="^4,097 tokens .*4,096.*lower --max-tokens"):
        train.train(settings(monkeypatch, *where, "--max-tokens", usual + 1))
    with pytest.raises(cli.InputError, match="^4,097 tokens "):
        call(monkeypatch, evaluate, "--base", *where, "--max-new-tokens", 4097)


# ----------------------------------------------------------------------------------------------------------------------
# Spare rows, tokens, and what the model can do


def test_an_old_driver_is_named_where_torch_finds_no_gpu(checkpoint, tmp_path, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nMore.")

    monkeypatch.setattr(torch.cuda, "init", init)
    changed("config", hidden_size=3072, num_hidden_layers=32)(copy_of(checkpoint, tmp_path))
    with pytest.raises(cli.InputError, match=r"^.*too old \(found version 12020\); run where there is one.*$"):
        pretrained.find(tmp_path / "copy")
    assert pretrained.find(tmp_path / "copy", computes=False)  # as analysis.export does


def test_norms_of_the_spare_rows_are_told_small_ones_found_and_large_ones_refused():
    matrix, tokens = torch.eye(20), {"<|APA|>": 18, "<|MDD|>": 19}
    matrix[19] *= 0.01
    small, line = pretrained.spare_rows(matrix, tokens)
    assert small == ["<|MDD|>"]
    assert line == "norms of spare rows: <|APA|> 1, <|MDD|> 0.01; median of all rows 1"
    matrix[18] *= 11
    with pytest.raises(cli.InputError, match="APA.* 11, .*cannot be 10 times the usual"):
        pretrained.spare_rows(matrix, tokens)


def test_a_real_tokenizer_that_cuts_text_in_another_way_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(pretrained, "VOCABULARY", 1)
    with pytest.raises(cli.InputError, match=r"not the one of pretraining: .*0 10 DH EH S.*gives \["):
        load(checkpoint)
    ids = tiny.new_tokenizer().encode(pretrained.SENTENCE)
    monkeypatch.setattr(pretrained, "SENTENCE_IDS", ids)
    assert load(checkpoint)


def test_five_recordings_are_transcribed_and_a_deaf_model_is_warned_of(new_model, utterances, monkeypatch, capsys):
    model = new_model()
    assert (
        pretrained.check_hearing(model, models.generate, utterances) is None
    )  # the demo's tokenizer spells no English
    monkeypatch.setattr(pretrained, "VOCABULARY", 1)
    assert pretrained.check_hearing(model, models.generate, utterances) > pretrained.DEAF
    assert re.search(r"hearing: WER \d.* on 5 recordings.*WARNING: .*hardly hears", capsys.readouterr().out, re.S)
    texts = [(f" {utterance.text.capitalize()}.", 9, False) for utterance in utterances[:5]]
    assert pretrained.check_hearing(model, lambda *_: texts, utterances) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_training_begins_with_the_question_whether_the_model_hears(short_run, monkeypatch):
    class Asked(Exception):
        pass

    def ask(model, generate, utterances):
        raise Asked(len(utterances))

    monkeypatch.setattr(pretrained, "check_hearing", ask)
    with pytest.raises(Asked, match="8"):
        short_run(monkeypatch)


def test_the_golden_answer_is_compared_with_what_the_checkpoint_writes(checkpoint, monkeypatch, capsys):
    with pytest.raises(cli.RunError, match="expects 'The answer for 1[+]1 is 2"):
        call(monkeypatch, golden, "--model", checkpoint)
    model = load(checkpoint, "none").eval()
    how = models.generate, golden.QUESTION, [torch.empty(0)], golden.NEW_TOKENS
    (written,) = pretrained.ask(model, *how)
    monkeypatch.setattr(golden, "ANSWER", written)
    golden.main()
    assert capsys.readouterr().out.endswith("as expected\n")
