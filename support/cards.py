"""Cards: the README.md beside an adapter or an exported checkpoint, with the lines that load it, in the hub's format.

PEFT checks no more of a base than the names of its layers, and those of the bare checkpoint are right for every
adapter. So one that needs more than that says so where PEFT looks for names, and PEFT's own error shows it.
"""

from huggingface_hub import EvalResult, ModelCardData

import prompts

# In the place of an adapter's target modules; as a regex it matches none of the network
GUARD = "(this adapter does not fit the bare checkpoint: README.md beside it has the lines that load it)"

ADAPTER = """\
---
{front}
---

# English pronunciation evaluation, epoch {epoch}

Trained after arXiv 2509.02915 on {data}: strategy `{strategy}`, speech adapter `{speech_adapter}`. It belongs to the
base `{model}`{revision}{more}. settings.json has all settings.

    python evaluate.py --adapter FOLDER                         # scores it
    python -m analysis.export --adapter FOLDER NEW_FOLDER       # a checkpoint that transformers loads alone
{lines}"""
FOUR_BITS = """
Its base is kept in 4 bits (NF4), with the shipped speech adapter beside it as it is. evaluate.py loads it so.
"""
CODE = """
With transformers and PEFT alone, `adapter` is this folder:

```python
{code}
```
"""

CHECKPOINT = """\
---
{front}
---

# English pronunciation evaluation

Four scores (0-10) and a transcript of words and phones of read English, after arXiv 2509.02915. Fine-tuned from
`{model}`{revision} on {data}, epoch {epoch} (strategy `{strategy}`, speech adapter `{speech_adapter}`{quantize}). All
of it is folded into the weights ({dtype}), and the control tokens are in the tokenizer.

{said}

{numbers}

{use}"""
SCORED = ("accuracy_pcc", "fluency_pcc", "prosodic_pcc", "total_pcc", "wer", "per", "detection_f1")
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
MICROSOFT = """\
The layout is that of microsoft/Phi-4-multimodal-instruct, for engines that serve it. No engine was run on it.

    vllm serve FOLDER --trust-remote-code --max-model-len 4096

More than 4096 makes vLLM take the long factors of its position encoding for every request. prompts.json has the two
prompts as they were trained, around `<|audio_1|>`; a chat template would put other tokens in front.
"""


def of_checkpoint(settings, layout, said, numbers):
    """The card of an exported checkpoint.

    settings: of train.py, plain values; layout: "transformers" or "microsoft"; said: lines about the weights; numbers:
    of metrics.json, empty where there are none.
    """
    results = _results(settings, numbers) if settings["data_revision"] else {}
    return CHECKPOINT.format(
        **{key: settings[key] for key in ("epoch", "data", "strategy", "speech_adapter", "model", "dtype")},
        front=front("transformers", settings, pipeline_tag="audio-text-to-text", **results).to_yaml().strip(),
        revision=_commit(settings),
        quantize=f", base in 4 bits ({settings['quantize']})" if settings["quantize"] else "",
        said="\n".join(line[0].upper() + line[1:] + "." for line in said),
        numbers=_table(numbers),
        use=TRANSFORMERS if layout == "transformers" else MICROSOFT,
    )


def _results(settings, numbers):
    where = {"task_type": "audio-text-to-text", "dataset_type": settings["data"], "dataset_name": settings["data"]}
    found = [
        EvalResult(**where, metric_type=key, metric_value=numbers[key])
        for key in SCORED
        if numbers.get(key) is not None
    ]
    return {"model_name": "pronunciation evaluation", "eval_results": found} if found else {}


def _table(numbers):
    """Numbers with their intervals as Markdown."""
    if not numbers:
        return "How well it scores was not measured (evaluate.py had not been run on it)."
    rows = ["| metric | value | 95 % interval over speakers |", "|---|---|---|"]
    for key in SCORED:
        value, low, high = (numbers.get(name) for name in (key, f"{key}_low", f"{key}_high"))
        interval = f"{low:.3f} to {high:.3f}" if None not in (low, high) else "-"
        rows.append(f"| {key} | {value:.3f} | {interval} |" if value is not None else f"| {key} | - | - |")
    return "\n".join([*rows, "", "Measured by evaluate.py, before folding."])


def _commit(settings):
    return f" (commit {settings['revision']})" if settings["revision"] else ""


def needs_more(settings):
    """Whether an adapter fits something else than the bare checkpoint; settings: of train.py, plain values."""
    return settings["speech_adapter"] == "merge" or settings["strategy"] == "unfreeze"


def of_adapter(settings, targets):
    """The card of an epoch's folder. settings: of train.py with the epoch; targets: regex of the layers with LoRA."""
    merged, strategy = settings["speech_adapter"] == "merge", settings["strategy"]
    more = [", with its speech adapter folded in"] * merged + [", with trained.safetensors"] * (strategy != "lora")
    code = CODE.format(code=loading_code(settings, targets))
    return ADAPTER.format(
        **{key: settings[key] for key in ("epoch", "data", "strategy", "speech_adapter", "model")},
        front=front("peft", settings).to_yaml().strip(),
        revision=_commit(settings),
        more="".join(more),
        lines=FOUR_BITS if settings["quantize"] else code,
    )


def front(library, settings, **more):
    """The card's front matter. Folders are not named there: the hub would read their names as its own ids."""
    ids = {"base_model": settings["model"], "datasets": [settings["data"]]}
    known = {key: ids[key] for key, revision in zip(ids, ("revision", "data_revision")) if settings[revision]}
    return ModelCardData(language="en", license="mit", library_name=library, **known, **more)


def loading_code(settings, targets):
    """Python lines after which `model` and `tokenizer` are those that were trained."""
    pinned = f", revision={settings['revision']!r}" if settings["revision"] else ""
    merge, strategy = settings["speech_adapter"] == "merge", settings["strategy"]
    lines = ["import torch"]
    lines += ["from peft import PeftConfig, PeftModel"] * (merge or strategy != "full")
    lines += ["from safetensors.torch import load_file"] * (strategy != "lora")
    lines += [
        "from transformers import Phi4MultimodalForCausalLM, PreTrainedTokenizerFast",
        "",
        f"base = {settings['model']!r}",
        f"tokenizer = PreTrainedTokenizerFast.from_pretrained(base{pinned})",
        f"tokenizer.add_tokens({[*prompts.CONTROL_TOKENS.values()]}, special_tokens=True)",
        f"model = Phi4MultimodalForCausalLM.from_pretrained(base{pinned}, dtype=torch.{settings['dtype']})",
    ]
    if merge:
        lines += [
            f"speech = PeftConfig.from_pretrained(base, subfolder='speech-lora'{pinned})",
            f"speech.target_modules = {targets!r}",
            f"model = PeftModel.from_pretrained(model, base, config=speech, subfolder='speech-lora'{pinned})",
            "model = model.merge_and_unload()",
        ]
    if strategy != "lora":
        lines += ["model.load_state_dict(load_file(f'{adapter}/trained.safetensors'), strict=False)"]
    if strategy != "full":
        lines += [
            "config = PeftConfig.from_pretrained(adapter)",
            f"config.target_modules = {targets!r}",
            "model = PeftModel.from_pretrained(model, adapter, config=config)",
        ]
    return "\n".join(lines)
