"""The files of a model and of an adapter: what they must look like before transformers and PEFT read them."""

from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file

import data
from support import cli, files

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


def check_fit(weights, own):
    """Both must have the same keys with the same shapes."""
    if difference := sorted(weights.keys() ^ own.keys()):
        raise ValueError(f"it does not fit the model: {len(difference)} keys differ, such as {difference[0]}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(f"it does not fit the model: {key} is {[*value.shape]}, not {[*own[key].shape]}")
