"""How does a trained model leave this project? As a checkpoint that stands alone.

    python -m analysis.export exported/ --adapter out/
    python -m analysis.export exported/ --adapter out/ --like Phi-4-multimodal-instruct/    # in Microsoft's layout

The model is loaded as training held it, LoRA is folded into its weights, the two control tokens get rows of the
embedding and a place in the tokenizer: transformers loads the folder without PEFT and without this project, as
README.md in it shows. vLLM and SGLang serve Microsoft's layout, which has other names of weights; code, configuration
and processor then come from a copy of Microsoft's own repository, of which no code is run here.
"""

from collections.abc import Set
from dataclasses import dataclass
import json
from pathlib import Path
import re

from tyro.conf import Positional

from analysis import assessor
import evaluate
import prompts
from support import answers, cli, files
from support import run as runs
from support.later import when_used

with when_used():
    import huggingface_hub
    from peft.tuners import lora
    from peft.utils import integrations
    import tokenizers
    import torch
    import transformers

    import model as models
    from support import pretrained

SHARD = "2GB"  # of a file of weights; our choice: it is copied once more while it is written
BESIDE = ("*.json", "*.jinja", "*.txt", "LICENSE")  # what stands beside weights
# From transformers' names to Microsoft's: the way back of its convert_phi4_multimodal_weights_to_hf.py
MICROSOFT = {
    r"(feed_forward_\w+)\.gate_up_proj": r"\1.net.0.linear",
    r"(feed_forward_\w+)\.down_proj": r"\1.net.2",
    r"(encoders\.\d+\.self_attn)\.([qkv])_proj": r"\1.linear_\2",
    r"(encoders\.\d+\.self_attn)\.o_proj": r"\1.linear_out",
    r"\.up_proj_for_speech": ".audio_projection.speech.0",
    r"\.down_proj_for_speech": ".audio_projection.speech.2",
    r"\.up_proj_for_vision_speech": ".audio_projection.vision.0",
    r"\.down_proj_for_vision_speech": ".audio_projection.vision.2",
    r"\.img_projection_up": ".img_projection.0",
    r"\.img_projection_down": ".img_projection.2",
    r"\.global_img_feature_extensor": ".glb_GN",
    r"\.sub_img_feature_extensor": ".sub_GN",
}


@dataclass(kw_only=True)
class Settings:
    folder: Positional[Path]  # the new checkpoint's: a new one, or one that this command wrote
    adapter: Path  # run folder of train.py, or one of its epoch-N folders
    epochs: str | None = None  # of a run folder: last (default), best (on held-out speakers), or a number
    model: str | None = None  # checkpoint folder or hub id of the base model; default: that of the training
    revision: str | None = None  # of the hub id
    dtype: runs.Dtype | None = None  # of the new checkpoint; default: that of the training
    like: Path | None = None  # for Microsoft's layout: a copy of microsoft/Phi-4-multimodal-instruct


def export(settings: Settings) -> str:
    """Write the checkpoint; returns what folding did, in one line.

    Raises InputError for what does not fit together, for an adapter that changes no layer, and where the folder holds
    what was not written here.
    """
    folder, like = settings.folder, settings.like
    evaluation = assessor.evaluation_of(evaluate.ModelSettings(adapter=settings.adapter, epochs=settings.epochs))
    if like and files.read_json(like / "config.json", dict).get("model_type") != "phi4mm":
        raise cli.InputError(f"--like {like} is no copy of Microsoft's repository: its model is not a phi4mm")
    training = evaluation.training
    name = settings.model or training.model
    revision = settings.revision or training.revision or runs.HUB_MODEL_REVISION
    held = training.dtype or models.default_dtype()
    dtype = settings.dtype or held
    with files.own(folder, "analysis.export", "README.md", ["[!.]*"], "folder"):
        checkpoint = pretrained.find(name, revision, computes=False)
        pretrained.fetch(checkpoint, BESIDE)
        base = checkpoint.folder
        if base.resolve() == folder.resolve():
            raise cli.InputError(f"{folder} holds the base model that the adapter belongs to: choose another folder")
        model = evaluate.load(evaluation, checkpoint, evaluate.ModelSettings(dtype=held, attention="sdpa"))
        said = fold(model, dtype)
        rows = model.core.get_input_embeddings().weight.data
        rows[model.control_ids] = model.control.data.to(rows)
        weights = {key: weight.to(getattr(torch, dtype)) for key, weight in model.core.state_dict().items()}
        weights = {key: weight for key, weight in weights.items() if key not in model.core.all_tied_weights_keys}
        if like:
            weights = {microsoft_name(key): weight for key, weight in weights.items()}
            check_names(weights.keys(), like)
        for older in folder.glob("model*.safetensors*"):
            older.unlink()
        made = training.model_copy(update={"model": name, "revision": checkpoint.commit, "dtype": dtype})
        (folder / "README.md").write_text(card(made, said, scores(evaluation, settings.adapter), like is not None))
        for kind in (*BESIDE, "*.py") if like else BESIDE:
            for file in (like or base).glob(kind):
                if file.name != pretrained.WEIGHTS_INDEX:
                    (folder / file.name).write_bytes(files.read_bytes(file))
        write_tokenizer(folder, model.tokenizer)
        stops = [model.tokenizer.convert_tokens_to_ids(prompts.END), model.tokenizer.eos_token_id]  # as evaluated
        change_json(folder / "generation_config.json", eos_token_id=stops, suppress_tokens=model.control_ids)
        change_json(folder / "config.json", dtype=dtype, torch_dtype=dtype)
        (folder / "prompts.json").write_bytes(files.read_bytes(evaluation.adapter / "prompts.json"))
        # last: what was killed is no model
        huggingface_hub.save_torch_state_dict(weights, folder, max_shard_size=SHARD)
    return said


def fold(model: "models.SpeechModel", dtype: str) -> str:
    """Fold LoRA into the weights of its layers, and leave the bare network in the model; returns what that did.

    To what training held, in 4 bits too, what was learnt is added in float32, and the sum is rounded once.
    """
    norms, changed = torch.zeros(3), False  # squared, over all layers: of what was held, learnt, lost by rounding
    for layer in filter(lambda module: isinstance(module, lora.LoraLayer), model.network.modules()):
        with torch.no_grad():
            held = integrations.dequantize_module_weight(layer.get_base_layer()).float()  # (out, in)
            learnt = sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
            folded = (held + learnt).to(getattr(torch, dtype))
            norms += torch.stack([held.norm(), learnt.norm(), (folded.float() - held - learnt).norm()]).cpu() ** 2
        changed = changed or not folded.equal(held.to(folded.dtype))
        layer.get_base_layer().weight = torch.nn.Parameter(folded, requires_grad=False)
    if not changed:
        raise cli.InputError("the adapter changes no layer: the checkpoint would be the base model")
    model.network = model.network.unload()
    share, lost = (norms[1] / norms[0]).sqrt(), (norms[2] / norms[1]).sqrt()
    return f"what is folded in changes the layers by {share:.2%}, and rounding to {dtype} takes {lost:.2%} of that"


def microsoft_name(name: str) -> str:
    """What Microsoft's code calls a weight that transformers calls `name`."""
    for pattern, replacement in MICROSOFT.items():
        name = re.sub(pattern, replacement, name)
    return name


def check_names(names: Set[str], like: Path) -> None:
    """Microsoft's index must have the same weights, but for its two adapters. Raises InputError."""
    index = like / pretrained.WEIGHTS_INDEX
    listed = files.read_json(index, pretrained.WeightsIndex).weight_map
    theirs = {name.replace("base_layer.", "") for name in listed if "lora" not in name}
    if different := sorted(theirs ^ names):
        raise cli.InputError(f"{index}: {len(different)} weights are not those of this model, such as {different[0]}")


def write_tokenizer(folder: Path, tokenizer: "transformers.PreTrainedTokenizerFast") -> None:
    """Write tokenizer.json of the tokenizer that was trained with, which has the control tokens.

    All added tokens go into the vocabulary as well: the ids of those that are not there are counted when the file is
    read, and come out otherwise where the vocabulary has holes. Raises InputError where a prompt would be read as
    other tokens than in training.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        content["model"]["vocab"][token["content"]] = token["id"]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    own = tokenizers.Tokenizer.from_file(str(path))
    for task in prompts.TASKS:
        text = prompts.build_prompt(task)
        if own.encode(text, add_special_tokens=False).ids != tokenizer.encode(text, add_special_tokens=False):
            raise cli.InputError(f"{path.name} reads the {task} prompt as other tokens than in training")


def change_json(path: Path, **values: str | list[int]) -> None:
    content = files.read_json(path, dict) if path.is_file() else {}
    path.write_text(json.dumps(content | values, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# The card

TEXT = """\
---
language: en
library_name: transformers
license: mit
pipeline_tag: audio-text-to-text
{ids}---
<!-- "{signature}" -->

# English pronunciation evaluation

Four scores (0-10) and a transcript of words and phones of read English, after arXiv 2509.02915. Fine-tuned from
`{made.model}`{commit} on {made.data}, epoch {made.epoch} (strategy `{made.strategy}`, speech adapter
`{made.speech_adapter}`{quantize}). All of it is folded into the weights ({made.dtype}), and the control tokens are in
the tokenizer: {said}.

{measured}

{use}"""
TRANSFORMERS = """\
`folder` is this one, `file` a recording of one channel at 16 kHz; prompts.json has "APA" (scores) and "MDD"
(transcript):

```python
import json
import soundfile
import torch
from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
extractor = Phi4MultimodalFeatureExtractor.from_pretrained(folder)
model = Phi4MultimodalForCausalLM.from_pretrained(folder, dtype="auto").eval()

samples, rate = soundfile.read(file, dtype="float32")
heard = extractor(samples, sampling_rate=rate, return_tensors="pt")
prompt = json.load(open(f"{folder}/prompts.json"))["APA"]
before, after = (tokenizer.encode(part, add_special_tokens=False) for part in prompt.split("<|audio_1|>"))
audio = [model.config.audio_config.audio_token_id] * int(heard["audio_embed_sizes"][0])
ids = torch.tensor([before + audio + after])
sound = {key: heard[key] for key in ("audio_input_features", "audio_embed_sizes")}
written = model.generate(input_ids=ids, **sound, max_new_tokens=200, do_sample=False)
answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
```
"""
ENGINES = """\
The layout is that of microsoft/Phi-4-multimodal-instruct, for engines that serve it. No engine was run on it.

    vllm serve FOLDER --trust-remote-code --max-model-len 4096

More than 4096 makes vLLM take the long factors of its position encoding for every request. prompts.json has the two
prompts as they were trained, around `<|audio_1|>`; a chat template would put other tokens in front.
"""
SCORED = ("accuracy_pcc", "fluency_pcc", "prosodic_pcc", "total_pcc", "wer", "per", "detection_f1")


def card(made: runs.TrainingSettings, said: str, measured: str, engines: bool) -> str:
    """README.md of an exported checkpoint. said: of `fold`; measured: of `scores`; engines: Microsoft's layout.

    The front matter names no folders: the hub would read their names as its own ids.
    """
    ids = f"base_model: {made.model}\n" if made.revision else ""
    return TEXT.format(
        ids=ids + (f"datasets:\n- {made.data}\n" if made.data_revision else ""),
        signature=files.signature("analysis.export"),
        made=made,
        commit=f" (commit {made.revision})" if made.revision else "",
        quantize=f", base in 4 bits ({made.quantize}), whose values the layers have" if made.quantize else "",
        said=said,
        measured=measured,
        use=ENGINES if engines else TRANSFORMERS,
    )


def scores(evaluation: evaluate.Evaluation, run: Path) -> str:
    """What evaluate.py measured of the model that is exported, as Markdown."""
    path = run / answers.METRICS
    numbers = files.read_json(path, dict[str, str | float | None]) if path.is_file() else {}
    if numbers.get("evaluated") != evaluation.label:
        return "How well it scores was not measured (evaluate.py had not been run on it)."
    rows = ["| metric | value | 95 % interval over speakers |", "|---|---|---|"]
    for key in SCORED:
        found = [numbers.get(name) for name in (key, f"{key}_low", f"{key}_high")]
        value, low, high = ("-" if number is None else f"{number:.3f}" for number in found)
        rows.append(f"| {key} | {value} | {low} to {high} |")
    return "\n".join([*rows, "", "Measured by evaluate.py, before folding."])


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    cli.say(export(settings), f"written: {settings.folder}")


if __name__ == "__main__":
    cli.run_script("analysis.export", main)
