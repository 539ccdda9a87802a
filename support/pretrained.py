"""The pretrained model: which files it needs, what they must look like, and how transformers and PEFT read them.

Nobody has held this code against the real files yet. docs/checkpoint.md lists what is assumed of them, and which line
here sees it when an assumption is wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
import re
from types import SimpleNamespace
from typing import Annotated, Literal
import warnings

import jiwer
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field
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
SPEECH_ADAPTER = "speech-lora"  # folder of the shipped speech adapter inside the checkpoint
ADAPTER_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's names
FILES = "config generation_config preprocessor_config tokenizer tokenizer_config special_tokens_map added_tokens"
FILES = [*(f"{name}.json" for name in FILES.split()), WEIGHTS_INDEX]  # and those of `weight_files`
FILES += [f"{SPEECH_ADAPTER}/*.json", f"{SPEECH_ADAPTER}/*.safetensors"]
LARGEST_CPU_MODEL = 1e9  # weights, roughly; a checkpoint above this is of no use without a GPU

# What the real tokenizer, with o200k's ranks, makes of a text. Another way of cutting text into words gives other ids.
SENTENCE = f"{prompts.USER}0 10 DH EH S{prompts.END}{prompts.ASSISTANT}"
SENTENCE_IDS = [200021, 15, 220, 702, 46797, 127805, 336, 200020, 200019]
VOCABULARY = 100_000  # tokens; a smaller tokenizer is no pretrained model's: the demo's knows a few words
SMALL, LARGE = 0.1, 10  # of the median norm: a spare row next to nothing, and one that was used; our choice


def _exactly(number):
    return Annotated[float, Field(ge=number, le=number)]


class AudioConfig(files.Shape):
    """The values that data.py and model.py count on."""

    chunk_size: Literal[-1] = -1  # attention to the whole recording
    time_reduction: Literal[8] = 8
    input_size: Literal[80] = 80
    downsample_rate: Literal[1] = 1


class ExtractorConfig(files.Shape):
    """The features that data.py and model.py count on, and that the audio encoder was trained with."""

    sampling_rate: Literal[16_000] = 16_000
    feature_size: Literal[80] = 80
    hop_length: Literal[160] = 160
    win_length: Literal[400] = 400
    n_fft: Literal[512] = 512
    preemphasis: _exactly(0.97) = 0.97
    mel_min_frequency: _exactly(0) = 0.0
    mel_max_frequency: _exactly(7690) = 7690.0


class ModelConfig(files.Shape):
    """What of a checkpoint's config.json is read here; what is left out in the file is as in transformers' class."""

    model_type: Literal["phi4_multimodal"]
    hidden_size: int = 3072
    num_hidden_layers: int = 32
    original_max_position_embeddings: int = 4096  # LongRoPE has other factors for what is longer
    audio_config: AudioConfig = AudioConfig()


class WeightsIndex(files.Shape):
    """model.safetensors.index.json: in which file each weight is."""

    weight_map: dict[str, str]


# ----------------------------------------------------------------------------------------------------------------------
# Finding


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found; of a hub id what is large may not be here yet."""

    name: str  # folder or hub id, as the user gave it
    folder: Path
    commit: str | None = None  # of a hub id

    def __str__(self) -> str:
        return f"model {self.name!r}" + (f" (commit {self.commit})" if self.commit else "")


def find(name: str | Path, revision: str | None = None, tokens: int = 0, computes: bool = True) -> Checkpoint:
    """Look a checkpoint up, once a run: nothing large is fetched, and the commit that `revision` names is fixed.

    tokens: of the longest prompt with its answer; computes: not merely folds weights. Raises InputError, before
    anything slow has started, where there is no checkpoint, where it has no usual positions for so many tokens, or to
    compute with 5.6 billion parameters without a GPU.
    """
    folder, commit = files.fetch(name, revision, "model", [CONFIG, WEIGHTS_INDEX])
    config = files.read_json(folder / CONFIG, ModelConfig)
    usual = config.original_max_position_embeddings
    if tokens > usual:
        raise cli.InputError(
            f"{tokens:,} tokens (--max-tokens and those of a new answer) are more than the {usual:,} for which {name} "
            f"has its usual positions: lower --max-tokens or --max-new-tokens"
        )
    weights = 12 * config.num_hidden_layers * config.hidden_size**2  # four projections of that size and the MLP's
    if computes and weights > LARGEST_CPU_MODEL and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # says of an old driver what it is; is_available is False without a word
        except Exception as error:
            raise cli.InputError(
                f"{name} needs a CUDA GPU, and torch finds none: {cli.first_line(error).rstrip('.')}; run where there "
                f"is one (the paper used 80 GB; torch 2.13 needs driver 580), or use the tiny model: python tiny.py, "
                f"then --model tiny/model --data tiny/corpus"
            ) from error
    return Checkpoint(str(name), folder, commit)


def fetch(checkpoint: Checkpoint, more: Iterable[str] = ()) -> None:
    """Download what is needed of a hub id, and no other files. more: patterns of further files that are wanted."""
    if checkpoint.commit:
        wanted = [*FILES, *weight_files(checkpoint.folder), *more]
        files.fetch(checkpoint.name, checkpoint.commit, "model", wanted)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights. Raises InputError for an index that is none.

    Others may lie beside them: a pull request at the hub keeps the files of `main` that it does not replace.
    """
    if not (folder / WEIGHTS_INDEX).exists():
        return ["model.safetensors"]
    return sorted(set(files.read_json(folder / WEIGHTS_INDEX, WeightsIndex).weight_map.values()))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@contextmanager
def loading(what: object) -> Iterator[None]:
    """Libraries say in many ways that a file is missing, does not fit, or is no file of theirs: one InputError."""
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:
        raise cli.InputError(f"{what} cannot be loaded: {cli.first_line(error)}") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises ValueError for values that are not finite."""
    weights = load_file(path)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} in {path} holds values that are not finite")
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


def is_real(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether this can be the tokenizer of a model that was pretrained on English."""
    return len(tokenizer) >= VOCABULARY


def load_reading(checkpoint: Checkpoint) -> tuple[PreTrainedTokenizerFast, Phi4MultimodalFeatureExtractor]:
    """Tokenizer and feature extractor."""
    files.check_regular(checkpoint.folder)
    files.read_json(checkpoint.folder / "preprocessor_config.json", ExtractorConfig)
    with loading(checkpoint):
        # Not AutoTokenizer: where a checkpoint names GPT-2's tokenizer class, as this one is reported to, it puts
        # GPT-2's splitting into words in the place of tokenizer.json's, and text becomes other tokens than in
        # pretraining (transformers issue 45920).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
        extractor = Phi4MultimodalFeatureExtractor.from_pretrained(checkpoint.folder)
    if is_real(tokenizer) and (found := tokenizer.encode(SENTENCE, add_special_tokens=False)) != SENTENCE_IDS:
        raise cli.InputError(
            f"{checkpoint}: its tokenizer is not the one of pretraining: {SENTENCE!r} gives {found}, not {SENTENCE_IDS}"
        )
    return tokenizer, extractor


def quieten() -> None:
    """Silence what transformers says while it loads and saves: no user can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def nf4(skipped: list[str] | None, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's way to keep frozen weights: 4-bit normal floats, their scales quantised once more.

    skipped: modules that stay as they are, each from the start of its name; dtype: of the arithmetic.
    """
    cli.need("bitsandbytes")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped)


def load_network(checkpoint: Checkpoint, dtype: str, attention: str, four_bits: bool) -> Phi4MultimodalForCausalLM:
    """The bare checkpoint, without its speech adapter, where it will compute.

    four_bits: keep the language model's layers as QLoRA does.
    """
    bits = nf4(["model.embed_tokens_extend", "lm_head"], torch.bfloat16) if four_bits else None
    quieten()
    with loading(checkpoint):
        network, loaded = Phi4MultimodalForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            # the encoders stay with sdpa: flash attention takes no bias, which the audio encoder's attention needs
            attn_implementation={"": attention, "audio_config": "sdpa", "vision_config": "sdpa"},
            quantization_config=bits,
            use_safetensors=True,
            output_loading_info=True,
        )
    kinds = ("missing", "unexpected", "mismatched")
    if wrong := [f"{key} is {kind}" for kind in kinds for key in sorted(map(str, loaded[f"{kind}_keys"]))]:
        raise cli.InputError(f"{checkpoint}: {len(wrong)} weights are not those of this model, such as: {wrong[0]}")
    for layer in network.modules() if four_bits else ():
        # on CPUs that have it bitsandbytes packs a layer's weights at the first evaluation, for good, and then gives no
        # gradient to what is below: training would go on, and learn little, after the first validation
        layer.support_avx512bf16_for_cpu = False
    return network if four_bits else network.to("cuda" if torch.cuda.is_available() else "cpu")


def read_config(folder: Path) -> LoraConfig:
    """PEFT's configuration in a folder; absolute, because PEFT would ask the hub for one that is not there."""
    with loading(f"{folder}/adapter_config.json"):
        files.check_regular(folder)
        config = LoraConfig.from_pretrained(folder.absolute())
        if not config.r > 0 < config.lora_alpha:
            raise ValueError(f"r {config.r}, lora_alpha {config.lora_alpha}: both must be above 0")
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
    if not all(norm <= LARGE * usual for norm in own.values()):  # so that nan is refused, too
        raise cli.InputError(f"{line}: a row that nothing used cannot be {LARGE} times the usual")
    return [token for token, norm in own.items() if norm < SMALL * usual], line


# ----------------------------------------------------------------------------------------------------------------------
# Does it hear?

TRANSCRIBE = "Transcribe the audio clip into text."  # as in Microsoft's examples
RECORDINGS, DEAF = 5, 0.5  # how many are transcribed, and the WER above which something is wrong; our choice


def ask(
    model: torch.nn.Module, generate: Callable, question: str, audio: Sequence[torch.Tensor], max_new_tokens: int
) -> list[str]:
    """Greedy answers to a plain question about each of the recordings, embedded, a list of (A, D).

    model: SpeechModel; generate: of model.py.
    """
    texts = prompts.USER, question + prompts.END + prompts.ASSISTANT
    before, after = (model.tokenizer.encode(text, add_special_tokens=False) for text in texts)
    asked = [SimpleNamespace(prompt_ids=before + [model.audio_id] * len(heard) + after) for heard in audio]
    return [text.strip() for text, *_ in generate(model, asked, audio, max_new_tokens)]


@torch.no_grad()
def check_hearing(model: torch.nn.Module, generate: Callable, utterances: Sequence) -> float | None:
    """Let the model transcribe a few recordings, and print its WER; a warning where it does not hear.

    Without its speech adapter the model writes that it cannot listen to audio, and training would start from there.
    model: SpeechModel, before training; generate: of model.py; utterances: to train on, the first few are taken.
    Returns the WER; None for a model with a tokenizer that no pretrained one has, such as the demo's, which cannot
    spell English.
    """
    if not is_real(model.tokenizer):
        return None
    spoken = [utterance.text for utterance in utterances[:RECORDINGS]]
    model.eval()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):  # as training hears them
        heard = ask(model, generate, TRANSCRIBE, model.hear(utterances[:RECORDINGS]), max_new_tokens=100)
    wer = jiwer.wer(*([" ".join(re.findall(r"[\w']+", text.upper())) for text in texts] for texts in (spoken, heard)))
    cli.say(f"hearing: WER {wer:.2f} on {len(spoken)} recordings of the corpus, before training")
    if wer > DEAF:
        cli.say(
            f"WARNING: the model hardly hears. It wrote {heard[0]!r} for {spoken[0]!r}. With --speech-adapter none "
            f"this is to be expected; otherwise the speech adapter does not work, and training would begin from nothing"
        )
    return wer
