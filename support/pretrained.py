"""The pretrained model: which files it needs, what they must look like, and how transformers and PEFT read them.

Nobody has held this code against the real files yet. docs/checkpoint.md lists what is assumed of them, and which line
here sees it when an assumption is wrong.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
import re
from typing import Annotated, Literal
import warnings

import jiwer
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file
import torch
from transformers import (
    BitsAndBytesConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import prompts
from support import cli, files

CONFIG, WEIGHTS_INDEX = "config.json", "model.safetensors.index.json"
FILES = "config generation_config preprocessor_config tokenizer tokenizer_config special_tokens_map added_tokens"
FILES = [*(f"{name}.json" for name in FILES.split()), WEIGHTS_INDEX]  # and those of `weight_files`
SPEECH_ADAPTER = "speech-lora"  # folder of the shipped speech adapter inside the checkpoint
ADAPTER_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's names
FILES += [f"{SPEECH_ADAPTER}/*.json", f"{SPEECH_ADAPTER}/*.safetensors"]
LARGEST_CPU_MODEL = 4e9  # bytes of weights; a checkpoint above this is of no use without a GPU
DRIVER, DRIVERS = Path("/proc/driver/nvidia/version"), {"12": 525, "13": 580}  # the oldest that a CUDA version takes

# What the real tokenizer, with o200k's ranks, makes of a text. Another way of cutting text into words gives other ids.
SENTENCE = f"{prompts.USER}0 10 DH EH S{prompts.END}{prompts.ASSISTANT}"
SENTENCE_IDS = [200021, 15, 220, 702, 46797, 127805, 336, 200020, 200019]
VOCABULARY = 100_000  # tokens; a smaller tokenizer is no pretrained model's: the demo's knows a few words
FAR = 10  # factor from the median norm beyond which a spare row is none that was left as it began; our choice

Size = Annotated[int, Field(ge=1, le=10**6)]  # of a model; what is beyond takes minutes to fail
Token = Annotated[int, Field(ge=0)]


def _exactly(number):
    return Annotated[float, Field(ge=number, le=number)]


class AudioConfig(files.Shape):
    """The values that model.py's way through the audio encoder counts on."""

    audio_token_id: Token = 0
    num_blocks: Size = 1
    chunk_size: Literal[-1] = -1  # attention to the whole recording
    time_reduction: Literal[8] = 8
    input_size: Literal[80] = 80
    downsample_rate: Literal[1] = 1


class ModelConfig(files.Shape):
    """What of a checkpoint's config.json is checked here; transformers reads the rest, and what is left out."""

    model_type: Literal["phi4_multimodal"]
    vocab_size: Size = 10**6
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    sliding_window: Size | None = None
    original_max_position_embeddings: Size = 4096  # LongRoPE has other factors for what is longer
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

    sampling_rate: Literal[16_000] = 16_000
    win_length: Literal[400] = 400
    hop_length: Literal[160] = 160
    feature_size: Literal[80] = 80
    n_fft: Literal[512] = 512
    audio_compression_rate: Literal[8] = 8
    audio_downsample_rate: Literal[1] = 1
    audio_feat_stride: Literal[1] = 1
    preemphasis: _exactly(0.97) = 0.97
    mel_min_frequency: _exactly(0) = 0.0
    mel_max_frequency: _exactly(7690) = 7690.0


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
def loading(what: str | Path) -> Iterator[None]:
    """Libraries say in many ways that a file is missing, does not fit, or is no file of theirs: one InputError."""
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:
        raise cli.InputError(f"{what} cannot be loaded: {cli.first_line(error)}") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
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


def check_fit(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Both must have the same keys with the same shapes."""
    if difference := sorted(weights.keys() ^ own.keys()):
        raise ValueError(f"it does not fit the model: {len(difference)} keys differ, such as {difference[0]}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(f"it does not fit the model: {key} is {[*value.shape]}, not {[*own[key].shape]}")


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights. Raises InputError for an index that is none.

    Others may lie beside them: a pull request at the hub keeps the files of `main` that it does not replace.
    """
    if not (folder / WEIGHTS_INDEX).exists():
        return ["model.safetensors"]
    return sorted(set(files.read_json(folder / WEIGHTS_INDEX, WeightsIndex).weight_map.values()))


def fetch(name: str, revision: str | None, more: Iterable[str] = ()) -> tuple[Path, str | None]:
    """The checkpoint's folder and commit, as `files.fetch` gives them, with the files that are needed and no others.

    more: patterns of further files that are wanted.
    """
    folder, commit = files.fetch(name, revision, "model", [CONFIG, WEIGHTS_INDEX])
    return files.fetch(name, commit or revision, "model", [*FILES, *weight_files(folder), *more])


def check(name: str, revision: str | None, speech_adapter: str, tokens: int = 0) -> str | None:
    """Stop before anything slow has started: no checkpoint, or 5.6 billion parameters without a GPU.

    speech_adapter: "none" where the shipped one is not needed; tokens: of the longest prompt with its answer. Nothing
    large is fetched. Returns the commit that `revision` of a hub id names, None for a folder. Raises InputError.
    """
    folder, commit = files.fetch(name, revision, "model", [CONFIG, WEIGHTS_INDEX])
    if not (folder / CONFIG).is_file():
        raise cli.InputError(f"model {name} holds no checkpoint: there is no {CONFIG} in it")
    config = files.read_json(folder / CONFIG, ModelConfig)
    if speech_adapter != "none" and not commit and not (folder / SPEECH_ADAPTER).is_dir():
        raise cli.InputError(
            f"model {name} has no {SPEECH_ADAPTER}/, the adapter through which it hears: copy it from the checkpoint, "
            f"or train with --speech-adapter none"
        )
    if tokens > config.original_max_position_embeddings:
        raise cli.InputError(
            f"{tokens:,} tokens (--max-tokens and those of a new answer) are more than the "
            f"{config.original_max_position_embeddings:,} for which {name} has its usual positions: lower --max-tokens "
            f"or --max-new-tokens"
        )
    if not torch.cuda.is_available() and files.size(name, commit, "model", weight_files(folder)) > LARGEST_CPU_MODEL:
        raise cli.InputError(
            f"{name} needs a CUDA GPU and {_why_no_gpu()}, or use the tiny model: python tiny.py, then --model "
            f"tiny/model --data tiny/corpus"
        )
    return commit


def _why_no_gpu():
    """Where there is a driver, torch says of an old one only that there is no GPU."""
    cuda, driver = torch.version.cuda, DRIVER.is_file() and re.search(r"(\d+)\.[\d.]+", files.read_text(DRIVER))
    if not (cuda and driver):
        return "this machine has none: run where there is one (the paper used 80 GB)"
    if int(driver[1]) < (needed := DRIVERS.get(cuda.split(".")[0], 580)):
        return (
            f"the driver here, {driver[0]}, is too old: torch {torch.__version__} needs {needed} or newer, so update it"
        )
    return f"torch finds none, though driver {driver[0]} is here: look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def is_real(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether this can be the tokenizer of a model that was pretrained on English."""
    return len(tokenizer) >= VOCABULARY


def load_reading(folder: Path, what: str) -> tuple[PreTrainedTokenizerFast, Phi4MultimodalFeatureExtractor]:
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
    if is_real(tokenizer) and (found := tokenizer.encode(SENTENCE, add_special_tokens=False)) != SENTENCE_IDS:
        raise cli.InputError(
            f"{what}: its tokenizer is not the one of pretraining: {SENTENCE!r} gives {found}, not {SENTENCE_IDS}"
        )
    return tokenizer, extractor


def quieten() -> None:
    """Silence what transformers says while it loads and saves: no user can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_network(
    folder: Path, what: str, dtype: str, attention: str, four_bit_layers: str | None = None
) -> Phi4MultimodalForCausalLM:
    """The bare checkpoint, without its speech adapter, where it will compute.

    four_bit_layers: regex of the layers that are kept in 4 bits; None for none.
    """
    weight_files(folder)  # raises for an index that names files elsewhere
    quieten()
    with loading(what):
        network, loaded = Phi4MultimodalForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            # the encoders stay with sdpa: flash attention takes no bias, which the audio encoder's attention needs
            attn_implementation={"": attention, "audio_config": "sdpa", "vision_config": "sdpa"},
            quantization_config=nf4() if four_bit_layers else None,
            use_safetensors=True,
            output_loading_info=True,
        )
    kinds = ("missing", "unexpected", "mismatched")
    if wrong := [f"{key} is {kind}" for kind in kinds for key in sorted(map(str, loaded[f"{kind}_keys"]))]:
        raise cli.InputError(f"{what}: {len(wrong)} weights are not those of this model, such as: {wrong[0]}")
    if four_bit_layers:
        check_quantised(network, four_bit_layers)
        return network
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def read_config(folder: Path) -> LoraConfig:
    """PEFT's configuration in a folder; absolute, because PEFT would ask the hub for one that is not there."""
    files.read_json(folder / "adapter_config.json", AdapterConfig)
    with loading(f"{folder}/adapter_config.json"):
        config = LoraConfig.from_pretrained(folder.absolute())
    config.base_model_name_or_path = None  # PEFT puts in the model's name, and warns where another one stands there
    return config


def load_exactly(network: PeftModel, weights: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Load adapter weights; every key must match."""
    check_fit(weights, get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False))
    set_peft_model_state_dict(network, weights, adapter_name=adapter_name)


@torch.no_grad()
def fold(network: PeftModel) -> torch.nn.Module:
    """The network with its adapter folded into the weights. Raises InputError where a layer stays as it was."""
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            before = layer.get_base_layer().weight.clone()
            layer.merge()
            if torch.equal(before, layer.get_base_layer().weight):
                raise cli.InputError(f"the speech adapter changes nothing: {name} is the same with it and without it")
    return network.unload()


def spare_rows(matrix: torch.Tensor, tokens: dict[str, int]) -> tuple[list[str], str]:
    """Which control tokens have a spare row next to nothing, and a line with the norms of all.

    matrix: the embedding, (V, D); tokens: {control token: its row}. A row that is far above the others would rule the
    norm of every step; InputError, since then the rows beyond the tokenizer's are not what they are taken for.
    """
    parts = matrix.split(4096)  # the whole matrix in float32 is 2.5 GB
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts])  # (V,)
    usual, own = norms.median().item(), {token: norms[row].item() for token, row in tokens.items()}
    line = "norms of spare rows: " + ", ".join(f"{token} {norm:.3g}" for token, norm in own.items())
    line += f"; median of all rows {usual:.3g}"
    if not all(norm <= FAR * usual for norm in own.values()):  # so that nan is refused, too
        raise cli.InputError(f"{line}: a row that nothing used cannot be {FAR} times the usual")
    return [token for token, norm in own.items() if norm < usual / FAR], line


# ----------------------------------------------------------------------------------------------------------------------
# Four bits: QLoRA's storage of frozen layers


def nf4() -> BitsAndBytesConfig:
    """QLoRA's storage of the language model's layers: 4-bit normal floats, their scales quantised once more.

    Raises InputError without bitsandbytes.
    """
    cli.need("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.embed_tokens_extend", "lm_head"],
    )


def check_quantised(network: torch.nn.Module, layers: str) -> None:
    """All of the language model's linear layers and no others must be quantised; raises ValueError.

    layers: regex of their names. A name in a skip list counts from the start of the module's name, so
    "embed_tokens_extend" without "model." skips nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in network.named_modules():
        expected = bool(re.fullmatch(layers, name))
        if isinstance(module, torch.nn.Linear) and isinstance(module, Linear4bit) != expected:
            raise ValueError(
                f"{name} is a {type(module).__name__}: nf4 is for the language model's layers, all of them"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Does it hear, and does it write?

TRANSCRIBE = "Transcribe the audio clip into text."  # as in Microsoft's examples
RECORDINGS, DEAF = 5, 0.5  # how many are transcribed, and the WER above which something is wrong; our choice


def write(model: torch.nn.Module, *parts: str | torch.Tensor, max_new_tokens: int) -> str:
    """Greedy text after a prompt, by transformers' own `generate`; parts: texts and audio embeddings, (A, D)."""
    core, tokenizer = model.core.eval(), model.tokenizer
    rows = core.get_input_embeddings()
    ids = [part if torch.is_tensor(part) else tokenizer.encode(part, add_special_tokens=False) for part in parts]
    embeds = [part if torch.is_tensor(part) else rows(torch.tensor(part, device=core.device)) for part in ids]
    embeds = torch.cat([part.to(embeds[0].dtype) for part in embeds])[None]  # (1, T, D)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=core.device.type == "cuda"):
        written = core.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=core.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=[tokenizer.convert_tokens_to_ids(prompts.END), tokenizer.eos_token_id],
            pad_token_id=core.config.pad_token_id,
        )
    return tokenizer.decode(written[0], skip_special_tokens=True).strip()


@torch.no_grad()
def check_hearing(model: torch.nn.Module, utterances: Sequence) -> float | None:
    """Let the model transcribe a few recordings, and print its WER; a warning where it does not hear.

    Without its speech adapter the model writes that it cannot listen to audio, and training would start from there.
    model: SpeechModel, before training; utterances: to train on, the first few are taken. Returns the WER; None for a
    model with a tokenizer that no pretrained one has, such as the demo's, which cannot spell English.
    """
    if not is_real(model.tokenizer):
        return None
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):  # as training hears them
        audio = model.hear(utterances[:RECORDINGS])
    asked = f"{TRANSCRIBE}{prompts.END}{prompts.ASSISTANT}"
    heard = [write(model, prompts.USER, embeddings, asked, max_new_tokens=100) for embeddings in audio]
    spoken = [utterance.text for utterance in utterances[:RECORDINGS]]
    wer = jiwer.wer(*([" ".join(re.findall(r"[\w']+", text.upper())) for text in texts] for texts in (spoken, heard)))
    cli.say(f"hearing: WER {wer:.2f} on {len(spoken)} recordings of the corpus, before training")
    if wer > DEAF:
        cli.say(
            f"WARNING: the model hardly hears. It wrote {heard[0]!r} for {spoken[0]!r}. With --speech-adapter none "
            f"this is to be expected; otherwise the speech adapter does not work, and training would begin from nothing"
        )
    return wer
