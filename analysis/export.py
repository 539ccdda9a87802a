"""How does a trained model leave this project? As a checkpoint that stands alone.

    python -m analysis.export exported/ --adapter out/
    python -m analysis.export exported/ --adapter out/ --format microsoft --like Phi-4-multimodal-instruct/

Speech adapter, LoRA, whatever else was trained and the rows of the control tokens are folded into the weights, and the
control tokens into the tokenizer: transformers loads the folder without PEFT and without this project, as README.md in
it shows. `--format microsoft` gives the names and files that vLLM and SGLang serve; code, configuration and processor
come from a copy of Microsoft's own repository (`--like`), of which no code is run here.

What was learnt is added in float32 and rounded once. One file of weights is in memory at a time.
"""

from dataclasses import dataclass, fields
import json
from pathlib import Path
import re
import shutil
from typing import Literal

from tyro.conf import Positional

from analysis import assessor
import evaluate
import prompts
from support import choices, cli, files, predictions
from support.later import when_used

with when_used():
    import tokenizers

    import model as models
    from support import cards, folded, pretrained

SHARD = 2e9  # bytes of a file of weights, about; our choice: small beside what is needed anyway
REQUIRED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
BESIDE = "processor_config.json chat_template.jinja chat_template.json vocab.json merges.txt LICENSE".split()
DATA, CODE = re.compile(r"[\w-]+\.(json|jinja|txt)|LICENSE"), re.compile(r"[\w-]+\.py")  # what stands beside weights
# From transformers' names to Microsoft's: the way back of its convert_phi4_multimodal_weights_to_hf.py
AUDIO, IMAGE = r"(model\.embed_tokens_extend\.audio_embed\.)", r"(model\.embed_tokens_extend\.image_embed\.)"
BLOCK = AUDIO + r"(encoder\.encoders\.\d+\.)"
MICROSOFT = {
    BLOCK + r"(feed_forward_\w+)\.gate_up_proj": r"\1\2\3.net.0.linear",
    BLOCK + r"(feed_forward_\w+)\.down_proj": r"\1\2\3.net.2",
    BLOCK + r"self_attn\.([qkv])_proj": r"\1\2self_attn.linear_\3",
    BLOCK + r"self_attn\.o_proj": r"\1\2self_attn.linear_out",
    AUDIO + r"up_proj_for_speech": r"\1audio_projection.speech.0",
    AUDIO + r"down_proj_for_speech": r"\1audio_projection.speech.2",
    AUDIO + r"up_proj_for_vision_speech": r"\1audio_projection.vision.0",
    AUDIO + r"down_proj_for_vision_speech": r"\1audio_projection.vision.2",
    IMAGE + r"img_projection_up": r"\1img_projection.0",
    IMAGE + r"img_projection_down": r"\1img_projection.2",
    IMAGE + r"global_img_feature_extensor": r"\1glb_GN",
    IMAGE + r"sub_img_feature_extensor": r"\1sub_GN",
}


@dataclass(kw_only=True)
class Settings:
    folder: Positional[Path]  # the new checkpoint's; it must not exist yet
    adapter: Path  # run folder of train.py, or one of its epoch-N folders
    epochs: str | None = None  # of a run folder: last (default), best (on held-out speakers), or a number
    model: str | None = None  # checkpoint folder or hub id of the base model; default: that of the training
    revision: str | None = None  # of the hub id
    dtype: choices.Dtype | None = None  # of the new checkpoint; default: that of the training
    format: Literal["transformers", "microsoft"] = "transformers"  # names of the weights, and the files beside them
    like: Path | None = None  # for --format microsoft: a copy of microsoft/Phi-4-multimodal-instruct


def check(settings):
    """The evaluate.Evaluation that is exported. Raises InputError for what does not go together."""
    if settings.folder.exists():
        raise cli.InputError(f"{settings.folder} exists: give the name of a new folder")
    if (settings.format == "microsoft") != (settings.like is not None):
        raise cli.InputError("--format microsoft and --like go together: its code and processor come from that copy")
    if settings.like and files.read_json(settings.like / "config.json", dict).get("model_type") != "phi4mm":
        raise cli.InputError(f"--like {settings.like} is no copy of Microsoft's repository: its model is not a phi4mm")
    names = {field.name for field in fields(evaluate.ModelSettings)}
    return assessor.evaluation_of(
        evaluate.ModelSettings(**{key: value for key, value in vars(settings).items() if key in names})
    )


def export(settings):
    """Write the checkpoint and return what it says of the weights, as lines. Nothing is written where it raises
    InputError: for what does not fit together, and for an adapter that changes no layer."""
    evaluation = check(settings)
    weights, tokenizer, source, base = trained_weights(evaluation, settings)
    names = {name: microsoft_name(name) if settings.like else name for name in weights.frozen}
    if settings.like:
        check_names(set(names.values()), settings.like)
    check_disk(settings.folder, sum(weight.nbytes for weight in weights.empty().values()))
    with files.whole(settings.folder) as temporary:
        temporary.mkdir()
        copy_files(settings.like or base, temporary, (DATA, CODE) if settings.like else (DATA,))
        add_control_tokens(temporary, tokenizer)
        stops = [tokenizer.convert_tokens_to_ids(prompts.END), tokenizer.eos_token_id]  # as model.generate has them
        change_json(temporary / "generation_config.json", eos_token_id=stops)
        change_json(temporary / "config.json", dtype=source.dtype, torch_dtype=source.dtype)
        texts = {task: prompts.build_prompt(task) for task in prompts.TASKS}
        (temporary / "prompts.json").write_text(json.dumps(texts, indent=2) + "\n")
        weights.write(temporary, names, SHARD)
        if not weights.measured.changed:
            raise cli.InputError(f"{evaluation.adapter} changes no layer: the checkpoint would be the base model")
        said = describe(weights.measured, source.dtype)
        card = cards.of_checkpoint(source.model_dump(), settings.format, said, numbers_of(evaluation, settings.adapter))
        (temporary / "README.md").write_text(card)
    return said


def trained_weights(evaluation, settings):
    """What a training made of its base: folded.Folded, tokenizer, its settings as they hold now, folder of the base."""
    training, adapter = evaluation.training, evaluation.adapter
    name, revision = settings.model or training.model, settings.revision or training.revision
    base, commit = pretrained.fetch(name, revision or choices.HUB_MODEL_REVISION, BESIDE)
    if settings.revision and not commit:
        raise cli.InputError(f"--revision {settings.revision} is of a hub id, and {name} is a folder: leave it out")
    files.read_json(base / "config.json", pretrained.ModelConfig)
    tokenizer, _ = pretrained.load_reading(base, f"model {name!r}")
    tokenizer.add_tokens([*prompts.CONTROL_TOKENS.values()], special_tokens=True)
    way, quantised = training.speech_adapter, training.quantize == "nf4"
    shipped = [] if way == "none" else [folded.read_adapter(base / pretrained.SPEECH_ADAPTER)]
    trained = [] if training.strategy == "full" else [folded.read_adapter(adapter)]
    beside = shipped if quantised or way == "continue" else []  # else it was merged
    held = training.dtype or models.default_dtype()
    dtype = settings.dtype or held
    weights = folded.Folded(
        base,
        held,
        dtype,
        models.LORA_TARGETS,
        merged=[] if beside else shipped,
        before=beside,
        after=trained if way == "continue" else beside + trained,
        replaced=None if training.strategy == "lora" else adapter / models.TRAINED_FILE,
        quantised=quantised,
    )
    return weights, tokenizer, training.model_copy(update={"model": name, "revision": commit, "dtype": dtype}), base


def check_disk(folder, needed):
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise cli.InputError(f"{parent} has {free / 1e9:.1f} GB of free disk and {needed / 1e9:.1f} GB are needed")


def describe(measured, dtype):
    """What folding did, as lines."""
    learnt, lost = measured.share("learnt", "began"), measured.share("lost", "learnt")
    lines = [f"training has changed its weights by {learnt:.2%}; rounding to {dtype} takes {lost:.2%} of that change"]
    if measured.checkpoint:
        quantised = measured.share("quantised", "checkpoint")
        lines += [
            f"the layers are those that 4 bits hold, to which training fitted: {quantised:.1%} off the base model's"
        ]
    return lines


def numbers_of(evaluation, run):
    """metrics.json of what is exported; empty where evaluate.py has not scored it."""
    path = run / "metrics.json"
    numbers = predictions.read_metrics(path) if path.is_file() else {}
    return numbers if numbers.get("evaluated") == evaluation.label else {}


def microsoft_name(name):
    """What Microsoft's code calls a weight that transformers calls `name`."""
    for pattern, replacement in MICROSOFT.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def check_names(names, like):
    """Microsoft's index must have the same weights, but for its two adapters. Raises InputError."""
    index = like / pretrained.WEIGHTS_INDEX
    listed = files.read_json(index, pretrained.WeightsIndex).weight_map
    theirs = {name.replace("base_layer.", "") for name in listed if "lora" not in name}
    if different := sorted(theirs ^ names):
        raise cli.InputError(f"{index}: {len(different)} weights are not those of this model, such as {different[0]}")


def copy_files(source, folder, kinds):
    """Copy the files of some kinds beside a checkpoint's weights. Raises InputError where one is missing."""
    for name in REQUIRED:
        if not (source / name).is_file():
            raise cli.InputError(f"{source} has no {name}: give a whole copy of the checkpoint")
    for file in source.iterdir():
        if any(kind.fullmatch(file.name) for kind in kinds) and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(files.read_bytes(file))


def add_control_tokens(folder, tokenizer):
    """Add the control tokens to tokenizer.json, with the ids that they have in `tokenizer`.

    All added tokens go into the vocabulary as well: the ids of those that are not there are counted when the file is
    read, and come out otherwise where the vocabulary has holes. Raises InputError where a prompt would be read as
    other tokens than in training.
    """
    path = folder / "tokenizer.json"
    content = files.read_json(path, dict)
    vocabulary, added, ids = content["model"]["vocab"], content["added_tokens"], tokenizer.get_vocab()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    for token in {*prompts.CONTROL_TOKENS.values()} - {token["content"] for token in added}:
        added.append({"id": ids[token], "content": token, **flags})
    for token in added:
        token["id"] = vocabulary[token["content"]] = ids.get(token["content"], token["id"])
    added.sort(key=lambda token: token["id"])
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    own = tokenizers.Tokenizer.from_file(str(path))
    for task in prompts.TASKS:
        text = prompts.build_prompt(task)
        if own.encode(text, add_special_tokens=False).ids != tokenizer.encode(text, add_special_tokens=False):
            raise cli.InputError(f"{path.name} reads the {task} prompt as other tokens than in training")


def change_json(path, **values):
    content = files.read_json(path, dict) if path.is_file() else {}
    path.write_text(json.dumps(content | values, indent=2) + "\n")


def main():
    settings = cli.parse(Settings, __doc__)
    print(*export(settings), f"written: {settings.folder}", sep="\n")


if __name__ == "__main__":
    cli.run_script("analysis.export", main)
