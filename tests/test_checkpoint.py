"""What is assumed of the real checkpoint (docs/checkpoint.md), each assumption against files that break it."""

import json
import re
import shutil
import sys

from conftest import copy_of, settings
import pytest
from safetensors.torch import load_file, save_file
import torch

from analysis import golden
import data
import evaluate
import model as models
import prompts
from support import cli, pretrained
import tiny
import train

SIZES = "--limit 8 --epochs 1 --batch-size 4 --accumulation 2 --learning-rate 3e-3".split()


def load(folder, speech_adapter="none"):
    return models.load_base(str(folder), None, "float32", "sdpa", speech_adapter)


def change_weights(path, change):
    """Rewrite a safetensors file; change: what is done to its dict of tensors."""
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    change(weights)
    save_file(weights, path, {"format": "pt"})


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
        monkeypatch.setattr(sys, "argv", f"evaluate.py --adapter {name} --limit 2 --max-new-tokens 8".split())
        evaluate.main()
        weights = load_file(f"{name}/epoch-1/adapter_model.safetensors")
        results.append((weights, open(f"{name}/predictions.jsonl").read()))
    (ours, our_answers), (theirs, their_answers) = results
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert our_answers == their_answers


def test_a_speech_adapter_that_changes_no_layer_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)

    def silence(weights):
        for name, weight in weights.items():
            weight *= "lora_A" in name

    change_weights(folder / pretrained.SPEECH_ADAPTER / pretrained.ADAPTER_FILE, silence)
    with pytest.raises(cli.InputError, match="^the speech adapter changes nothing: .*o_proj"):
        load(folder, "merge")


# ----------------------------------------------------------------------------------------------------------------------
# Files and configurations


def test_a_weight_that_the_model_does_not_have_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    extra = "model.layers.0.self_attn.q_proj.weight"
    change_weights(folder / "model.safetensors", lambda weights: weights.update({extra: torch.ones(2, 2)}))
    with pytest.raises(cli.InputError, match=f"1 weights are not those of this model, such as: {extra} is unexpected"):
        load(folder)


@pytest.mark.parametrize(
    "file, values",
    [
        ("config", {"audio_config": {"chunk_size": 18}}),
        ("config", {"audio_config": {"time_reduction": 4}}),
        ("config", {"audio_config": {"input_size": 128}}),
        ("config", {"audio_config": {"downsample_rate": 2}}),
        ("preprocessor_config", {"mel_min_frequency": 20}),
        ("preprocessor_config", {"mel_max_frequency": 8000.0}),
        ("preprocessor_config", {"audio_feat_stride": 2}),
        ("preprocessor_config", {"preemphasis": 0.0}),
    ],
)
def test_a_configuration_with_other_audio_than_the_code_computes_is_refused(checkpoint, tmp_path, file, values):
    path = copy_of(checkpoint, tmp_path) / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    name = [*(values.get("audio_config") or values)][0]
    with pytest.raises(cli.InputError, match=f"{file}.json: .*{name}"):
        pretrained.check(str(path.parent), None, "merge")
        load(path.parent)


def test_the_features_that_are_checked_are_those_that_data_py_counts_on():
    expected = pretrained.ExtractorConfig()
    assert (expected.sampling_rate, expected.win_length, expected.hop_length) == (16_000, data.FRAME, data.HOP)
    assert (expected.sampling_rate, expected.audio_compression_rate) == (data.SAMPLE_RATE, data.FRAMES_PER_TOKEN)


def test_only_the_files_that_the_index_names_count_as_weights(checkpoint, tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert pretrained.weight_files(checkpoint) == ["model.safetensors"]
    index = tmp_path / pretrained.WEIGHTS_INDEX
    index.write_text(json.dumps({"weight_map": {"a": names[1], "b": names[0], "c": names[1]}}))
    assert pretrained.weight_files(tmp_path) == names
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(cli.InputError, match="elsewhere"):
        pretrained.weight_files(tmp_path)


def test_more_tokens_than_the_usual_positions_stop_training_and_evaluation(where, monkeypatch):
    usual = tiny.POSITIONS - data.MAX_NEW_TOKENS
    assert pretrained.check(where[1], None, "merge", tiny.POSITIONS) is None
    with pytest.raises(cli.InputError, match="^4,097 tokens .*4,096.*lower --max-tokens"):
        train.train(settings(monkeypatch, *where, "--max-tokens", usual + 1))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--base", *map(str, where), "--max-new-tokens", "4097"])
    with pytest.raises(cli.InputError, match="^4,097 tokens "):
        evaluate.main()


# ----------------------------------------------------------------------------------------------------------------------
# Spare rows and tokens


def test_norms_of_the_spare_rows_are_told_and_one_far_above_the_others_is_refused():
    matrix, tokens = torch.eye(20), {"<|APA|>": 18, "<|MDD|>": 19}
    matrix[19] *= 0.01
    small, line = pretrained.spare_rows(matrix, tokens)
    assert small == ["<|MDD|>"]
    assert line == "norms of spare rows: <|APA|> 1, <|MDD|> 0.01; median of all rows 1"
    for size in (11.0, float("nan")):
        matrix[18] = size * torch.eye(20)[0]
        with pytest.raises(cli.InputError, match=r"<\|APA\|> (11|nan), .*: .*10 times the usual"):
            pretrained.spare_rows(matrix, tokens)


def test_a_real_tokenizer_that_cuts_text_in_another_way_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(pretrained, "VOCABULARY", 1)
    with pytest.raises(cli.InputError, match=r"not the one of pretraining: .*0 10 DH EH S.*gives \["):
        pretrained.load_reading(checkpoint, "it")
    ids = tiny.new_tokenizer().encode(pretrained.SENTENCE)
    monkeypatch.setattr(pretrained, "SENTENCE_IDS", ids)
    assert pretrained.load_reading(checkpoint, "it")


# ----------------------------------------------------------------------------------------------------------------------
# A GPU, and what the model can do


@pytest.mark.parametrize(
    "cuda, driver, message",
    [
        ("13.0", None, "this machine has none"),
        ("13.0", "535.183.01", "the driver here, 535.183.01, is too old: torch .* needs 580 or newer"),
        ("13.0", "580.65.06", "torch finds none, though driver 580.65.06 is here"),
    ],
)
def test_where_torch_finds_no_gpu_an_old_driver_is_told_from_none(tmp_path, monkeypatch, cuda, driver, message):
    if driver:
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sun May 12\n")
    (tmp_path / "config.json").write_text('{"model_type": "phi4_multimodal"}')
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(pretrained, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(pretrained, "LARGEST_CPU_MODEL", -1)
    with pytest.raises(cli.InputError, match=f"needs a CUDA GPU and {message}.*python tiny.py"):
        pretrained.check(str(tmp_path), None, "none")


def test_text_and_audio_give_what_the_models_own_generate_gives(new_model, utterances):
    model = new_model().eval()
    question = models.question(model, utterances[0], "MDD", control_token=False)
    audio = model.hear(utterances[:1])
    [(expected, *_)] = models.generate(model, [question], audio, 12)
    before, after = prompts.build_prompt("MDD", control_token=False).split(prompts.AUDIO)
    assert pretrained.write(model, before, audio[0], after, max_new_tokens=12) == expected.strip()


def test_five_recordings_are_transcribed_and_a_deaf_model_is_warned_of(new_model, utterances, monkeypatch, capsys):
    model = new_model()
    assert pretrained.check_hearing(model, utterances) is None  # the demo's tokenizer spells no English
    monkeypatch.setattr(pretrained, "VOCABULARY", 1)
    assert pretrained.check_hearing(model, utterances) > pretrained.DEAF
    assert re.search(r"hearing: WER \d.* on 5 recordings.*WARNING: .*hardly hears", capsys.readouterr().out, re.S)
    transcripts = iter(f"{utterance.text.capitalize()}." for utterance in utterances)
    monkeypatch.setattr(pretrained, "write", lambda *_, **__: next(transcripts))
    assert pretrained.check_hearing(model, utterances) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_training_begins_with_the_question_whether_the_model_hears(short_run, monkeypatch):
    class Asked(Exception):
        pass

    def ask(model, utterances):
        raise Asked(len(utterances))

    monkeypatch.setattr(pretrained, "check_hearing", ask)
    with pytest.raises(Asked, match="8"):
        short_run(monkeypatch)


def test_the_golden_answer_is_compared_with_what_the_checkpoint_writes(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["golden", "--model", str(checkpoint)])
    with pytest.raises(cli.RunError, match="expects 'The answer for 1[+]1 is 2"):
        golden.main()
    question = f"{prompts.USER}{golden.QUESTION}{prompts.END}{prompts.ASSISTANT}"
    answer = pretrained.write(load(checkpoint), question, max_new_tokens=golden.NEW_TOKENS)
    monkeypatch.setattr(golden, "ANSWER", answer)
    golden.main()
    assert capsys.readouterr().out.endswith("as expected\n")
