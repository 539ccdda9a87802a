"""The pretrained model: which files it needs, what they must look like, and how transformers and PEFT read them."""

from contextlib import contextmanager
from pathlib import Path
import re
from typing import Annotated, Literal
import warnings

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file
import torch
from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import data
import prompts
from support import cli, files, four_bits, hub

WEIGHTS, WEIGHTS_INDEX = "model*.safetensors", "model.safetensors.index.json"
FILES = "config generation_config preprocessor_config tokenizer tokenizer_config special_tokens_map added_tokens"
FILES = [*(f"{name}.json" for name in FILES.split()), WEIGHTS_INDEX, WEIGHTS]
SPEECH_ADAPTER = "speech-lora"  # folder of the shipped speech adapter inside the checkpoint
ADAPTER_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's names
FILES += [f"{SPEECH_ADAPTER}/*.json", f"{SPEECH_ADAPTER}/*.safetensors"]
LARGEST_CPU_MODEL = 4e9  # bytes of weights; a checkpoint above this is of no use without a GPU

Size = Annotated[int, Field(ge=1, le=10**6)]  # of a model; what is beyond takes minutes to fail
Token = Annotated[int, Field(ge=0)]


class AudioConfig(files.Shape):
    audio_token_id: Token = 0
    num_blocks: Size = 1


class ModelConfig(files.Shape):
    """What of a checkpoint's config.json is checked here; transformers reads the rest, and what is left out."""

    model_type: Literal["phi4_multimodal"]
    vocab_size: Size = 10**6
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    sliding_window: Size | None = None
    pad_token_id: Token = 0
    audio_config: AudioConfig = AudioConfig()

    @model_validator(mode="after")
    def _tokens_have_rows(self):
        for token in (self.pad_token_id, self.audio_config.audio_token_id):
            if token >= self.vocab_size:
                raise ValueError(f"token {token} has no row: vocab_size is {self.vocab_size}")
        return self


class ExtractorConfig(files.Shape):
    """preprocessor_config.json, where the features are those that data.py and the audio encoder count on."""

    sampling_rate: Literal[data.SAMPLE_RATE] = data.SAMPLE_RATE
    win_length: Literal[data.FRAME] = data.FRAME
    hop_length: Literal[data.HOP] = data.HOP
    feature_size: Literal[80] = 80
    n_fft: Literal[512] = 512
    audio_compression_rate: Literal[data.FRAMES_PER_TOKEN] = data.FRAMES_PER_TOKEN
    preemphasis: float = 0.97


class WeightsIndex(files.Shape):
    """model.safetensors.index.json: in which file each weight is; none outside the folder."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]]


Nothing = Annotated[list | dict, Field(max_length=0)] | None  # neither the shipped adapter nor train.py's has it


class AdapterConfig(files.Shape):
    """What of an adapter_config.json is checked here; PEFT reads the rest."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: Annotated[float, Field(gt=0, le=cli.LARGEST)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    trainable_token_indices: dict[str, list[int]] | None = None
    use_rslora: bool = False
    fan_in_fan_out: Literal[False] = False
    rank_pattern: Nothing = None
    alpha_pattern: Nothing = None
    modules_to_save: Nothing = None
    target_parameters: Nothing = None
    layers_to_transform: Nothing = None
    layers_pattern: Nothing = None


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@contextmanager
def loading(what):
    """Libraries say in many ways that a file is missing, does not fit, or is no file of theirs: one InputError."""
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:
        raise cli.InputError(f"{what} cannot be loaded: {cli.first_line(error)}") from error


def read_weights(path):
    """Tensors of a safetensors file. Raises ValueError for what is no such file, or holds no weights."""
    if not path.is_file():  # a FIFO would be waited for
        raise ValueError(f"{path} is missing, or is not a regular file")
    weights = load_file(path)
    for name, weight in weights.items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            raise ValueError(f"{name} in {path} holds values that are not finite numbers of floating point")
    return weights


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the LoRA in a folder, under the names that PEFT gives them. Raises ValueError, as `read_weights` does.

    Microsoft's own adapter has PEFT's prefix; transformers' converter of checkpoints writes bare names
    (`model.layers.0.self_attn.qkv_proj.lora_A.weight`), in which PeftModel.from_pretrained finds nothing, and says
    nothing: it leaves every lora_B at zero. Both are read.
    """
    weights = read_weights(folder / ADAPTER_FILE)
    return {name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name: weight for name, weight in weights.items()}


def check_fit(weights, own):
    """Both must have the same keys with the same shapes."""
    if difference := sorted(weights.keys() ^ own.keys()):
        raise ValueError(f"it does not fit the model: {len(difference)} keys differ, such as {difference[0]}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(f"it does not fit the model: {key} is {[*value.shape]}, not {[*own[key].shape]}")


def check(name, revision, speech_adapter):
    """Stop before anything slow has started: no checkpoint, or 5.6 billion parameters without a GPU.

    speech_adapter: "none" where the shipped one is not needed. Nothing large is fetched. Returns the commit that
    `revision` of a hub id names, None for a folder.
    """
    folder, commit = hub.fetch(name, revision, "model", ["config.json"])
    if not (folder / "config.json").is_file():
        raise cli.InputError(f"model {name} holds no checkpoint: there is no config.json in it")
    files.read_json(folder / "config.json", ModelConfig)
    if speech_adapter != "none" and not commit and not (folder / SPEECH_ADAPTER).is_dir():
        raise cli.InputError(
            f"model {name} has no {SPEECH_ADAPTER}/, the adapter through which it hears: copy it from the checkpoint, "
            f"or train with --speech-adapter none"
        )
    if not torch.cuda.is_available() and hub.size(name, commit, "model", WEIGHTS) > LARGEST_CPU_MODEL:
        raise cli.InputError(
            f"{name} needs a CUDA GPU and this machine has none: run where there is one (the paper used 80 GB), "
            f"or use the tiny model: python tiny.py, then --model tiny/model --data tiny/corpus"
        )
    return commit


def load_reading(folder, what):
    """Tokenizer and feature extractor."""
    files.read_json(folder / "preprocessor_config.json", ExtractorConfig)
    with loading(what):
        # Not AutoTokenizer: where a checkpoint names GPT-2's tokenizer class, as this one is reported to, it puts
        # GPT-2's splitting into words in the place of tokenizer.json's, and text becomes other tokens than in
        # pretraining (transformers issue 45920).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        extractor = Phi4MultimodalFeatureExtractor.from_pretrained(folder)
    for token in prompts.TURN_TOKENS:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise cli.InputError(f"{what} has no token {token}: it is not a Phi-4-multimodal checkpoint")
    if tokenizer.eos_token_id is None:
        raise cli.InputError(f"{what} has no end-of-text token: tokenizer_config.json is missing or names none")
    return tokenizer, extractor


def quieten():
    """Silence what transformers says while it loads and saves: no user can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_network(folder, what, dtype, attention, four_bit_layers=None):
    """The bare checkpoint, without its speech adapter, where it will compute.

    four_bit_layers: regex of the layers that are kept in 4 bits; None for none.
    """
    if (folder / WEIGHTS_INDEX).exists():
        files.read_json(folder / WEIGHTS_INDEX, WeightsIndex)
    quieten()
    with loading(what):
        network, loaded = Phi4MultimodalForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            # the encoders stay with sdpa: flash attention takes no bias, which the audio encoder's attention needs
            attn_implementation={"": attention, "audio_config": "sdpa", "vision_config": "sdpa"},
            quantization_config=four_bits.nf4() if four_bit_layers else None,
            use_safetensors=True,
            output_loading_info=True,
        )
    if wrong := sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"])):
        raise cli.InputError(f"{what}: {len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    if four_bit_layers:
        four_bits.check_quantised(network, four_bit_layers)
        return network
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def read_config(folder):
    """PEFT's configuration in a folder; absolute, because PEFT would ask the hub for one that is not there."""
    files.read_json(folder / "adapter_config.json", AdapterConfig)
    with loading(f"{folder}/adapter_config.json"):
        config = LoraConfig.from_pretrained(folder.absolute())
    config.base_model_name_or_path = None  # PEFT puts in the model's name, and warns where another one stands there
    return config


def load_exactly(network, weights, adapter_name="default", new=None):
    """Load adapter weights; every key must match, but for keys of the network that `new` describes."""
    own = get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)
    kept = {key: value for key, value in own.items() if new and re.search(new, key)}
    check_fit(weights, {key: value for key, value in own.items() if key not in kept})
    set_peft_model_state_dict(network, weights | kept, adapter_name=adapter_name)
