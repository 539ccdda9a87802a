"""What the model is, what trains, what the loss is, and what is saved.

    waveform -> log-mel -> audio encoder -> projector ─┐
                                                       ├─> language model (+ LoRA) -> logits -> answer
    <|user|><|APA|> ...prompt... -> embedding rows ────┘

The language model of Phi-4-multimodal never heard speech by itself: it hears through a speech LoRA that the checkpoint
ships in `speech-lora/` (rank 320). There are three ways to use it (`--speech-adapter`):

    continue  train that adapter itself; the paper's wording "the (speech) LoRA layers" (3.2)
    merge     fold it into the frozen weights and train a fresh LoRA on top; where those weights are quantised, which
              would round it away, keep it beside them, frozen
    none      leave it out

and three strategies: "lora" trains LoRA alone, "unfreeze" also audio encoder and projector (paper 3.2), "full" has no
LoRA and trains the weights of language model, audio encoder and projector themselves (not in the paper). The embedding
rows of the two control tokens train under all of them (our choice: the paper does not say how they enter the
tokenizer).

Shapes: B rows, T tokens of a row, A audio embeddings of a recording, F feature frames, D hidden size, N supervised
positions, V vocabulary.
"""

import hashlib
import json
import logging
import re
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

# Messages on import and loading that no user of these scripts can act on.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import TrainableTokensWrapper
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    BitsAndBytesConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import data
import loader
import prompts
import runtime
from support import cli, files, hub

transformers_logging.set_verbosity_error()  # load_base checks for itself that no weight is missing
transformers_logging.disable_progress_bar()

HUB_MODEL = "microsoft/Phi-4-multimodal-instruct"
HUB_MODEL_REVISION = "refs/pr/70"  # the checkpoint in the format of transformers' own classes; never merged into main
SPEECH_ADAPTER = "speech-lora"  # folder of the shipped speech adapter inside the checkpoint
WEIGHTS, WEIGHTS_INDEX = "model*.safetensors", "model.safetensors.index.json"
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    WEIGHTS_INDEX,
    WEIGHTS,
    f"{SPEECH_ADAPTER}/*.json",
    f"{SPEECH_ADAPTER}/*.safetensors",
]
SPEECH_ADAPTERS = ("merge", "continue", "none")
FROZEN_SPEECH = "speech"  # name of the shipped adapter inside the network where it stays beside quantised weights

# A regex, because "all-linear" or name suffixes would also hit the audio encoder: its modules have the same names.
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"

PARAMETER_GROUPS = {  # what a parameter's name contains
    "LoRA": r"\.lora_[AB]\.default\.",
    "control tokens": r"\.trainable_tokens_delta\.",
    "language model": r"^(model\.(embed_tokens|layers|norm)|lm_head)\.",
    "audio encoder": r"\.audio_embed\.encoder\.",
    "audio projector": r"\.audio_embed\.(up|down)_proj_for_speech\.",
}
ADAPTER_GROUPS = ("LoRA", "control tokens")
AUDIO_GROUPS = ("audio encoder", "audio projector")
STRATEGIES = {  # paper 3.2; "full" is not in the paper
    "lora": ("LoRA", "control tokens"),
    "unfreeze": ("LoRA", "control tokens", *AUDIO_GROUPS),
    "full": ("language model", *AUDIO_GROUPS),  # the control tokens' rows are part of the language model's embedding
}

ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's name
TRAINED_FILE = "trained.safetensors"  # trained weights outside the adapter
UNMOVED = 1e-4  # share of a layer's norm; our choice: below a fortieth of what bfloat16 can tell apart
SPARE = 0.1  # share of the median norm below which a spare row was never trained
MAX_ENCODER_TOKENS = 500  # 40 s; what is longer goes through the conformer blocks in chunks of this length
CANDIDATES = 16  # likeliest tokens by bfloat16 logits that are compared in float32; a tie of more was never seen
LARGEST_RANK = 3072  # the width of the real model: no matrix of it has a higher rank
LARGEST_CPU_MODEL = 4e9  # bytes of weights; a checkpoint above this is of no use without a GPU


class SpeechModel(nn.Module):
    """The network with its tokenizer and feature extractor: embeds audio, gives the loss, writes answers."""

    def __init__(self, network, tokenizer, extractor):
        super().__init__()
        self.network = network  # Phi4MultimodalForCausalLM, or a PeftModel around it
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.source = None  # (folder, commit at the hub, speech adapter) of load_base
        self.started_rows = []  # control tokens that load_base started from another row
        self.prepare = loader.Preparation(extractor, self.pad_id, self.audio_id)

    @property
    def core(self):
        """The Phi4MultimodalForCausalLM, adapter layers included."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def device(self):
        return self.core.device

    @property
    def audio_id(self):
        return self.core.config.audio_config.audio_token_id

    @property
    def pad_id(self):
        return self.core.config.pad_token_id

    # ------------------------------------------------------------------------------------------------------------------
    # Audio

    def keep_audio(self, folder):
        """Keep audio embeddings in `folder`, and read them from there, while nothing trains that makes them."""
        if not self._audio_trains:
            self.prepare.cache = loader.AudioCache(Path(folder) / self._audio_digest())

    @property
    def _audio_trains(self):
        return self.core.model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight.requires_grad

    def _audio_digest(self):
        """Names all that the embeddings of a recording depend on, besides the recording."""
        audio = self.core.model.embed_tokens_extend.audio_embed
        digest = hashlib.sha256(repr((torch.__version__, transformers.__version__, self.device.type)).encode())
        digest.update(self.extractor.to_json_string().encode())
        digest.update(audio.config.to_json_string().encode())
        for name, weight in audio.state_dict().items():
            digest.update(f"{name} {weight.dtype} {[*weight.shape]}".encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def hear(self, utterances):
        """Embeddings of each utterance's recording, a list of (A, D)."""
        return self.embed([self.prepare.recording(utterance) for utterance in utterances])

    def embed(self, recordings):
        """Embeddings of each loader.Recording, a list of (A, D).

        While nothing there trains each is computed alone: sums in a batch are rounded by the batch's shape, and a run
        that was resumed, or an evaluation with another batch size, would differ in the last bits.
        """
        if self._audio_trains:
            return self.embed_audio([recording.features for recording in recordings])
        return [self._embed_once(recording).to(self.device, non_blocking=True) for recording in recordings]

    @torch.no_grad()
    def _embed_once(self, recording):
        cache, file = self.prepare.cache, recording.file
        known = recording.embeddings
        if known is None and file:
            known = cache.read(file)  # it may have come since the micro-batch was prepared
        if known is None:
            (known,) = self.embed_audio([recording.features])
            if file:
                cache.write(file, known.cpu())
        return known

    def embed_audio(self, features):
        """Audio encoder and projector, so that a recording's embeddings do not depend on what it is batched with.

        transformers' own padded path does not give that: it adds a boolean mask to the attention bias, so padding is
        attended to, and the subsampling convolutions look past a recording's end. Here the convolutions run on each
        recording alone, and the conformer blocks, whose own convolutions are causal, on the padded batch with a
        0 / -inf mask. A chunk of a recording above 40 s is a row of that batch like any other, so processes that share
        the weights (FSDP2) call each block equally often, whatever the lengths of their recordings.

        features: list of log-mel features, each (F, 80). Returns a tuple of (A, D), A = ceil(F / 8).
        """
        audio = self.core.model.embed_tokens_extend.audio_embed
        encoder, weight = audio.encoder, audio.up_proj_for_speech.weight
        features = [feature.to(weight.device, weight.dtype)[None] for feature in features]  # each (1, F, 80)
        parts = [encoder.embed(encoder.encoder_embedding(feature), None)[0][0] for feature in features]  # (A, H)
        hidden = self._encode([chunk for part in parts for chunk in part.split(MAX_ENCODER_TOKENS)])  # (sum of A, H)
        return audio.down_proj_for_speech(F.gelu(audio.up_proj_for_speech(hidden))).split([len(p) for p in parts])

    def _encode(self, chunks):
        """The conformer blocks on a list of (A, H). Returns their outputs laid end to end, (sum of A, H)."""
        encoder = self.core.model.embed_tokens_extend.audio_embed.encoder
        hidden = pad_sequence(chunks, batch_first=True)  # (B, longest A, H)
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=hidden.device)
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]  # (B, A)
        mask = hidden.new_zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None]  # (B, 1, 1, A)
        attention_mask = mask + encoder.relative_attention_bias_layer(hidden)  # (B, heads, A, A)
        for block in encoder.encoders:
            if self.core.is_activation_checkpointing:  # transformers' own does not reach these blocks
                hidden = checkpoint(block, hidden, attention_mask, use_reentrant=False)
            else:
                hidden = block(hidden, attention_mask)
        return hidden[~padding]

    def _inputs_embeds(self, input_ids, placeholders, audio):
        """Token embeddings with the audio embeddings in the place of their placeholders, (B, T, D).

        placeholders: (P,), positions in the rows laid end to end; audio: list of (A, D).
        """
        embeds = _rows(self.core.get_input_embeddings(), input_ids)  # (B, T, D)
        audio = torch.cat(audio).to(embeds.dtype)  # (sum of A, D)
        if len(placeholders) != len(audio):
            raise ValueError(f"{len(placeholders)} audio placeholders for {len(audio)} audio embeddings")
        return embeds.flatten(0, 1).index_copy(0, placeholders, audio).view_as(embeds)

    def _logits(self, hidden):
        """Logits (N, V) of hidden states (N, D)."""
        head, trained = _trained_rows(self.core.lm_head)
        logits = head(hidden)
        for token, row in trained.items():
            logits[:, token] = F.linear(hidden, row.to(head.weight.dtype)[None])[:, 0]
        return logits

    def _exact_logits(self, hidden, tokens):
        """Logits (B, K) of some tokens (B, K) in float32, whatever type the weights have. hidden: (B, D).

        bfloat16 has 8 bits: logits between 16 and 32 are 0.125 apart, and the likeliest two are often equal.
        """
        rows = _rows(self.core.lm_head, tokens)  # (B, K, D)
        return (rows.float() * hidden.float()[:, None]).sum(dim=-1)

    def _likeliest(self, hidden):
        """The likeliest token (B,) after hidden states (B, D)."""
        logits = self._logits(hidden)  # (B, V)
        if logits.dtype == torch.float32:
            return logits.argmax(dim=-1)
        tokens = logits.topk(CANDIDATES).indices  # (B, CANDIDATES)
        return tokens.gather(1, self._exact_logits(hidden, tokens).argmax(dim=-1, keepdim=True))[:, 0]

    # ------------------------------------------------------------------------------------------------------------------
    # Loss

    def forward(self, batch):
        """Summed loss of a loader.MicroBatch; see `loss`."""
        return self.loss(batch, self.embed(batch.recordings))

    def loss(self, batch, audio):
        """Cross-entropy summed over the supervised tokens of a micro-batch.

        The caller divides by the supervised tokens of the whole step, so that every token counts alike however the
        step is cut. Logits exist at supervised positions only: with a vocabulary of 200,064 they are the largest
        tensor of a step, and most positions hold prompt or audio. Rows are padded on the right, so causal attention
        needs no mask, and the faster kernels take none.

        batch: loader.MicroBatch; audio: list of (A, D), one for each row.
        """
        input_ids, placeholders, supervised, targets = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (batch.input_ids, batch.placeholders, batch.supervised, batch.targets)
        )
        hidden = self.core.model(
            inputs_embeds=self._inputs_embeds(input_ids, placeholders, audio), use_cache=False
        ).last_hidden_state  # (B, T, D)
        logits = self._logits(hidden.flatten(0, 1)[supervised])  # (N, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def compile_layers(self):
        """Compile each layer of the language model, for micro-batches of any length."""
        for layer in self.core.model.layers:
            layer.compile(dynamic=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Answers

    def question(self, utterance, task, control_token=True):
        """An example without an answer."""
        prompt = data.encode_prompt(utterance, task, self.tokenizer, self.audio_id, control_token)
        return data.Example(utterance, task, prompt, [])

    def answer(
        self, utterances, scoring=("greedy",), max_new_tokens=data.MAX_NEW_TOKENS, control_token=True, tasks=None
    ):
        """The lines of predictions.jsonl for some utterances, as dicts.

        scoring: of APA, "greedy" for the answer that the model writes, "expected" for the probability of each score;
        without "greedy" the output is made of the likeliest scores, and there are no "tokens" and "truncated".
        tasks: where they are not those that an utterance has labels for.
        """
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            asked = [
                (self.question(utterance, task, control_token), embeddings)
                for utterance, embeddings in zip(utterances, self.hear(utterances), strict=True)
                for task in tasks or utterance.tasks
            ]
            written = [pair for pair in asked if pair[0].task != "APA" or "greedy" in scoring]
            scored = [pair for pair in asked if pair[0].task == "APA" and "expected" in scoring]
            texts = self.generate(*zip(*written), max_new_tokens) if written else []
            distributions = self.score_distributions(*zip(*scored)).tolist() if scored else []
        lines = {
            (q.utterance.id, q.task): {
                "id": q.utterance.id,
                "task": q.task,
                "speaker": q.utterance.speaker,
                "output": None,
                "reference": data.reference(q.utterance, q.task),
            }
            for q, _ in asked
        }
        for (question, _), (text, tokens, truncated) in zip(written, texts):
            lines[question.utterance.id, question.task] |= {"output": text, "tokens": tokens, "truncated": truncated}
        for (question, _), values in zip(scored, distributions):
            line = lines[question.utterance.id, "APA"]
            line["scores"] = dict(zip(prompts.SCORES, values))
            if line["output"] is None:
                likeliest = {name: value.index(max(value)) for name, value in line["scores"].items()}
                line["output"] = prompts.apa_target(likeliest)
        return list(lines.values())

    @torch.no_grad()
    def generate(self, examples, audio, max_new_tokens):
        """Greedy answers to a batch of questions. In one of both tasks the shorter answers take no steps of their own.

        audio: list of (A, D), one for each example. Returns a list of (text, number of tokens, truncated); truncated:
        the limit came before <|end|>.
        """
        stop = {self.tokenizer.convert_tokens_to_ids(prompts.END), self.tokenizer.eos_token_id}
        written = [[] for _ in examples]  # token ids
        rows = list(range(len(examples)))  # of the batch: which example each is
        hidden, state = self._read_prompts(examples, audio)
        for step in range(max_new_tokens):
            tokens = self._likeliest(hidden)  # (B,)
            for row, token in zip(rows, tokens.tolist()):
                if not written[row] or written[row][-1] not in stop:
                    written[row].append(token)
            unfinished = [i for i, row in enumerate(rows) if written[row][-1] not in stop]
            if not unfinished or step == max_new_tokens - 1:
                break
            if 2 * len(unfinished) <= len(rows):  # rarely, because the cache is copied
                rows = [rows[i] for i in unfinished]
                tokens, state = tokens[unfinished], _select(state, unfinished)
            hidden, state = self._read_on(tokens[:, None], state)
        answers = []
        for tokens in written:
            truncated = tokens[-1] not in stop
            text = self.tokenizer.decode(tokens if truncated else tokens[:-1], skip_special_tokens=False)
            answers.append((text, len(tokens), truncated))
        return answers

    @torch.no_grad()
    def score_distributions(self, examples, audio):
        """Probabilities of the values 0-10 for each score of an answer, (B, 4, 11). examples: APA questions.

        The answer's text is given up to a score, the distribution of the next token is read at the eleven values and
        normalised over them, and the likeliest value is given as the model's own before the next score is read: four
        short passes with one cache, and no output that could be malformed. audio: list of (A, D), one for each example.
        """
        before, values = data.encode_score_slots(self.tokenizer)
        values = torch.tensor(values, device=self.device).expand(len(examples), -1)  # (B, 11)
        begun = [replace(example, prompt_ids=example.prompt_ids + before[0]) for example in examples]
        hidden, state = self._read_prompts(begun, audio)
        distributions = [self._exact_logits(hidden, values).softmax(dim=-1)]  # of each score, (B, 11)
        for following in before[1:]:
            own = values.gather(1, distributions[-1].argmax(dim=-1, keepdim=True))  # (B, 1)
            text = torch.tensor(following, device=own.device).expand(len(own), -1)
            hidden, state = self._read_on(torch.cat([own, text], dim=1), state)
            distributions.append(self._exact_logits(hidden, values).softmax(dim=-1))
        return torch.stack(distributions, dim=1)

    def _read_prompts(self, examples, audio):
        """Hidden states of the prompts' last tokens (B, D), and the state to read on from: (cache, mask (B, T)).

        Padded on the right, so that no mask is needed (see `loss`); `_read_on` leaves the padding out of its attention.
        """
        batch = self.prepare.pad(examples)
        input_ids, placeholders = batch.input_ids.to(self.device), batch.placeholders.to(self.device)
        output = self.core.model(inputs_embeds=self._inputs_embeds(input_ids, placeholders, audio), use_cache=True)
        lengths = torch.tensor([len(example) for example in examples], device=self.device)
        mask = (torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]).long()  # (B, T)
        ends = output.last_hidden_state[torch.arange(len(examples), device=self.device), lengths - 1]
        return ends, (output.past_key_values, mask)

    def _read_on(self, tokens, state):
        """Read further tokens (B, n). Returns hidden states of the last ones (B, D), and the state after them."""
        cache, mask = state
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        output = self.core.model(
            inputs_embeds=_rows(self.core.get_input_embeddings(), tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :],  # padding counts nowhere
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1], (output.past_key_values, mask)


def _select(state, rows):
    """The state of `_read_on` for some rows of its batch, a list of their numbers."""
    cache, mask = state
    cache.batch_select_indices(torch.tensor(rows, device=mask.device))
    return cache, mask[rows]


# The rows of the control tokens train while the matrix they lie in is frozen. PEFT's layer copies the matrix with the
# rows put in, for the embedding and once more for the head, and the gradient is as large: 1.2 GB each at full size. The
# two functions below give the same numbers from the frozen matrix and the few rows.


def _trained_rows(layer):
    """An embedding or head as it is frozen, and {token: row (D,)} of what PEFT trains of it and has not merged."""
    if not isinstance(layer, TrainableTokensWrapper):
        return layer, {}
    adapter = layer.token_adapter
    if adapter.merged:
        return adapter.base_layer, {}  # not the wrapper, whose `weight` is a copy even then
    return adapter.base_layer, dict(zip(adapter.token_indices["default"], adapter.trainable_tokens_delta["default"]))


def _rows(layer, tokens):
    """The rows (..., D) that some tokens have in an embedding or head."""
    frozen, trained = _trained_rows(layer)
    rows = F.embedding(tokens, frozen.weight)
    for token, row in trained.items():
        rows = torch.where((tokens == token)[..., None], row.to(rows.dtype), rows)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Loading


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


def check_model(name, revision):
    """Stop before anything slow has started: no checkpoint, or 5.6 billion parameters without a GPU.

    Nothing large is fetched. Returns the commit that `revision` of a hub id names, None for a folder.
    """
    folder, commit = hub.fetch(name, revision, "model", ["config.json"])
    if not (folder / "config.json").is_file():
        raise cli.InputError(f"model {name} holds no checkpoint: there is no config.json in it")
    files.read_json(folder / "config.json", ModelConfig)
    if not torch.cuda.is_available() and hub.size(name, commit, "model", WEIGHTS) > LARGEST_CPU_MODEL:
        raise cli.InputError(
            f"{name} needs a CUDA GPU and this machine has none: run where there is one (the paper used 80 GB), "
            f"or use the tiny model: python tiny.py, then --model tiny/model --data tiny/corpus"
        )
    return commit


@contextmanager
def _loading(what):
    """Libraries say in many ways that a file is missing, does not fit, or is no file of theirs: one InputError."""
    try:
        yield
    except cli.InputError:
        raise
    except Exception as error:
        raise cli.InputError(f"{what} cannot be loaded: {cli.first_line(error)}") from error


def default_dtype():
    """Type of frozen weights where none is asked for."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def default_workers():
    """Processes that prepare steps, where no number is asked for: they pay beside a GPU, which waits for them."""
    return 2 if torch.cuda.is_available() else 0


def load_base(name, revision, dtype, attention, speech_adapter, quantize=None):
    """The pretrained model, with the control tokens in its tokenizer; with "merge", the speech adapter is folded in.

    name: checkpoint folder or hub id (`revision` of the hub id); dtype: "float32" or "bfloat16"; attention: of the
    language model, "sdpa", "eager" or "flash_attention_2"; quantize: None, or "nf4" for the language model's layers.
    Weights are read from safetensors alone, and no code of the checkpoint is run. Raises InputError when the
    checkpoint cannot be loaded.
    """
    folder, commit = hub.fetch(name, revision, "model", MODEL_FILES)
    files.read_json(folder / "preprocessor_config.json", ExtractorConfig)
    if (folder / WEIGHTS_INDEX).exists():
        files.read_json(folder / WEIGHTS_INDEX, WeightsIndex)
    with _loading(f"model {name!r}" + (f" (revision {revision})" if commit else "")):
        # Not AutoTokenizer: where a checkpoint names GPT-2's tokenizer class, as this one is reported to, it puts
        # GPT-2's splitting into words in the place of tokenizer.json's, and text becomes other tokens than in
        # pretraining (transformers issue 45920).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        extractor = Phi4MultimodalFeatureExtractor.from_pretrained(folder)
        network, loaded = Phi4MultimodalForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            # the encoders stay with sdpa: flash attention takes no bias, which the audio encoder's attention needs
            attn_implementation={"": attention, "audio_config": "sdpa", "vision_config": "sdpa"},
            quantization_config=_nf4() if quantize else None,
            use_safetensors=True,
            output_loading_info=True,
        )
        network.name_or_path = str(name)  # what PEFT writes beside an adapter, not the folder in the hub's cache
        if wrong := sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"])):
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
        if quantize:
            _check_quantised(network)
        else:
            network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        if speech_adapter == "merge" and quantize:
            network = _with_speech_adapter(network, folder, FROZEN_SPEECH, lora_dropout=0.0)
            for key, parameter in network.named_parameters():
                if ".lora_" in key:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
        elif speech_adapter == "merge":
            network = _with_speech_adapter(network, folder).merge_and_unload()

    for token in prompts.TURN_TOKENS:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise cli.InputError(f"model {name!r} has no token {token}: it is not a Phi-4-multimodal checkpoint")
    if tokenizer.eos_token_id is None:
        raise cli.InputError(f"model {name!r} has no end-of-text token: tokenizer_config.json is missing or names none")
    tokenizer.add_tokens(list(prompts.CONTROL_TOKENS.values()), special_tokens=True)
    rows = network.get_input_embeddings().weight.shape[0]
    if max(control_token_ids(tokenizer)) >= rows:
        raise cli.InputError(f"model {name!r} has {rows} embedding rows, none to spare for the control tokens")
    network.requires_grad_(False)
    model = SpeechModel(network, tokenizer, extractor)
    model.source = (folder, commit, speech_adapter)
    model.started_rows = _start_rows(network.get_input_embeddings().weight, tokenizer)
    return model


def _start_rows(matrix, tokenizer):
    """Start control tokens whose spare rows are next to nothing from the row of <|user|>; returns those tokens.

    The model normalises a row before it is read, so the gradient of a row with a thousandth of the usual norm is a
    thousand times the usual one: it would rule the clipped norm of every step. matrix: the embedding, (V, D).
    """
    norms = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)  # (V,)
    user = tokenizer.convert_tokens_to_ids(prompts.USER)
    small = [token for token in control_token_ids(tokenizer) if norms[token] < SPARE * norms.median()]
    for token in small:
        matrix.data[token] = matrix.data[user].clone()
    return tokenizer.convert_ids_to_tokens(small)


def _nf4():
    """QLoRA's storage of the language model's layers: 4-bit normal floats, their scales quantised once more."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.embed_tokens_extend", "lm_head"],
    )


def _check_quantised(network):
    """All of the language model's linear layers and no others must be quantised: a skip list that looks right is not.

    A name in it counts from the start of the module's name, so "embed_tokens_extend" without "model." keeps nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in network.named_modules():
        expected = bool(re.fullmatch(LORA_TARGETS, name))
        if isinstance(module, nn.Linear) and isinstance(module, Linear4bit) != expected:
            raise ValueError(
                f"{name} is a {type(module).__name__}: nf4 is for the language model's layers, all of them"
            )


def control_token_ids(tokenizer):
    """Ids of the control tokens, in the order of prompts.TASKS. They lie in spare rows of the embedding matrix."""
    return tokenizer.convert_tokens_to_ids([prompts.CONTROL_TOKENS[task] for task in prompts.TASKS])


def _with_speech_adapter(network, folder, adapter_name="default", **changes):
    """The network with the shipped speech adapter; `changes` replace values of its configuration."""
    config = _read_config(folder / SPEECH_ADAPTER)
    config.target_modules = LORA_TARGETS  # the shipped list of suffixes would also hit the audio encoder
    for key, value in changes.items():
        setattr(config, key, value)
    network = get_peft_model(network, config, adapter_name=adapter_name)
    weights = _read_weights(folder / SPEECH_ADAPTER / ADAPTER_FILE)
    _load_exactly(network, weights, adapter_name, new=r"trainable_tokens_delta")
    return network


def _read_config(folder):
    """PEFT's configuration in a folder; absolute, because PEFT would ask the hub for one that is not there."""
    files.read_json(folder / "adapter_config.json", AdapterConfig)
    return LoraConfig.from_pretrained(folder.absolute())


def _read_weights(path):
    """Tensors of a safetensors file. Raises ValueError for what is no such file, or holds no weights."""
    if not path.is_file():  # a FIFO would be waited for
        raise ValueError(f"{path} is missing, or is not a regular file")
    weights = load_file(path)
    for name, weight in weights.items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            raise ValueError(f"{name} in {path} holds values that are not finite numbers of floating point")
    return weights


def _attach(network, config):
    """Add the adapter that trains, or was trained. A frozen speech adapter stays active beside it."""
    if not isinstance(network, PeftModel):
        return get_peft_model(network, config)
    network.add_adapter("default", config)
    network.base_model.set_adapter([FROZEN_SPEECH, "default"])
    return network


def _load_exactly(network, weights, adapter_name="default", new=None):
    """Load adapter weights; every key must match, but for keys of the network that `new` describes."""
    own = get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)
    kept = {key: value for key, value in own.items() if new and re.search(new, key)}
    _check_fit(weights, {key: value for key, value in own.items() if key not in kept})
    set_peft_model_state_dict(network, weights | kept, adapter_name=adapter_name)


def _check_fit(weights, own):
    """Both must have the same keys with the same shapes."""
    if difference := sorted(weights.keys() ^ own.keys()):
        raise ValueError(f"it does not fit the model: {len(difference)} keys differ, such as {difference[0]}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(f"it does not fit the model: {key} is {[*value.shape]}, not {[*own[key].shape]}")


# ----------------------------------------------------------------------------------------------------------------------
# Training: the adapter, and what of the model trains


def memory_of_full(network):
    """Bytes that training all weights takes, before activations: {what: bytes}. network: on any device, meta too."""
    patterns = [PARAMETER_GROUPS[group] for group in STRATEGIES["full"]]
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    trained = sum(size for name, size in sizes.items() if any(re.search(pattern, name) for pattern in patterns))
    return {
        "weights, gradients and Adam's moments": 16 * trained,  # float32
        "frozen weights": 2 * (sum(sizes.values()) - trained),  # bfloat16
        "autocast's copies of the weights": 2 * trained,  # bfloat16, from a forward pass to its backward pass
    }


def check_memory(name, revision, memory):
    """Stop before the weights are read when `--strategy full` cannot fit. memory: bytes that the GPU has."""
    folder, _ = hub.fetch(name, revision, "model", ["config.json"])
    with torch.device("meta"):
        parts = memory_of_full(Phi4MultimodalForCausalLM(Phi4MultimodalConfig.from_pretrained(folder)))
    if sum(parts.values()) > memory:
        listed = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in parts.items())
        raise cli.InputError(
            f"--strategy full takes {sum(parts.values()) / 1e9:.1f} GB before activations ({listed}), "
            f"and the GPU has {memory / 1e9:.1f}: share them with torchrun --nproc-per-node N and "
            f"--shard, or use --strategy unfreeze"
        )


def add_adapter(model, rank, alpha, dropout):
    """Put the LoRA that is to be trained into the model: a fresh one, or the shipped one with "continue".

    rank, alpha and dropout are the fresh one's. Returns the configuration of the adapter, PEFT's LoraConfig.
    """
    folder, commit, speech_adapter = model.source
    tokens = {"embed_tokens": control_token_ids(model.tokenizer)}
    if speech_adapter == "continue":
        model.network = _with_speech_adapter(
            model.network, folder, trainable_token_indices=tokens, inference_mode=False, revision=commit
        )
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=LORA_TARGETS,
            trainable_token_indices=tokens,
            task_type="CAUSAL_LM",
            revision=commit,
        )
        model.network = _attach(model.network, config)
    return model.network.peft_config["default"]


def set_trainable(model, strategy):
    """Freeze everything, then open the parameter groups of the strategy.

    Trained parameters are kept in float32: a step of 2e-5 is lost in bfloat16's 8 bits of precision.
    Returns {group: number of parameters}. Raises ValueError when a group matches nothing.
    """
    model.requires_grad_(False)
    counts = {}
    for group in STRATEGIES[strategy]:
        chosen = [p for name, p in model.core.named_parameters() if re.search(PARAMETER_GROUPS[group], name)]
        if not chosen:
            raise ValueError(f"strategy {strategy!r}: no parameter belongs to group {group!r}")
        for parameter in chosen:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        counts[group] = sum(parameter.numel() for parameter in chosen)
    return counts


def shard(model):
    """Spread weights, gradients and optimiser state of what trains over all processes (FSDP2); together.

    A layer's weights come together only while it computes. What is frozen stays whole in each process.
    """
    mesh = init_device_mesh(model.device.type, (runtime.processes(),))
    half = torch.bfloat16 if model.device.type == "cuda" else None
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)}
    for layer in [*model.core.model.layers, *model.core.model.embed_tokens_extend.audio_embed.encoder.encoders]:
        fully_shard(layer, **how)
    fully_shard(model, **how, ignored_params={p for p in model.parameters() if not p.requires_grad})
    register_fsdp_forward_method(model, "generate")


@torch.no_grad()
def moved(model):
    """How far training has moved the layers that the adapter sits on, and the rows of the control tokens.

    Returns {"adapter_moved": median over layers of |alpha/r (BA - B0 A0)| / |W|, "control_tokens_moved": mean over the
    tokens of |row - row0| / |row0|}; B0 A0 is the shipped adapter where that is trained on ("continue"), else 0.
    Empty for a model without an adapter.
    """
    if not isinstance(model.network, PeftModel):
        return {}
    start = _shipped_weights(model)
    changes = []
    for name, layer in model.core.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (side["default"].weight.double() for side in (layer.lora_A, layer.lora_B))  # (r, in), (out, r)
            if start:
                a0, b0 = (start[f"base_model.model.{name}.lora_{side}.weight"].to(a) for side in "AB")
                a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
            change = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()  # |BA| without BA, which is as large as W
            weight = dequantize_module_weight(layer.get_base_layer())
            changes.append(layer.scaling["default"] * change / torch.linalg.vector_norm(weight, dtype=torch.float32))
    tokens = model.core.get_input_embeddings().token_adapter
    row, row0 = (rows["default"].float() for rows in (tokens.trainable_tokens_delta, tokens.trainable_tokens_original))
    return {
        "adapter_moved": torch.stack(changes).median().item(),
        "control_tokens_moved": ((row - row0).norm(dim=1) / row0.norm(dim=1)).mean().item(),
    }


def _shipped_weights(model):
    """The shipped adapter's weights where the adapter started from them, else None."""
    folder, _, speech_adapter = model.source
    return load_file(folder / SPEECH_ADAPTER / ADAPTER_FILE) if speech_adapter == "continue" else None


def describe_moved(moved):
    """The dict of `moved` as a sentence."""
    layers, rows = moved["adapter_moved"], moved["control_tokens_moved"]
    warning = ": next to nothing, so it is still the model it started from" if layers < UNMOVED else ""
    return f"the adapter has moved its layers by {layers:.2%} (median), the control tokens' rows by {rows:.2%}{warning}"


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def trained_parameters(model):
    """{name: parameter} of what trains; names are those inside the Phi4MultimodalForCausalLM."""
    return {name: parameter for name, parameter in model.core.named_parameters() if parameter.requires_grad}


def save_trained(model, folder, settings):
    """Write the trained weights, with the exact settings beside them; together. The folder appears whole or not at all.

    The adapter is written in PEFT's format. Trained weights outside of it ("unfreeze", "full") go to
    trained.safetensors: float32, but for "full" the type they will be used in (`--dtype`), half as large on a GPU.
    """
    dtype = getattr(torch, settings["dtype"]) if settings["strategy"] == "full" else torch.float32
    weights = {}
    for name, parameter in _outside_adapter(model, settings["strategy"]).items():
        if (weight := runtime.on_rank_0(parameter)) is not None:
            weights[name] = weight.to(dtype).contiguous()
    if cli.process_rank():
        return
    with files.whole(Path(folder)) as temporary:
        temporary.mkdir()
        if isinstance(model.network, PeftModel):
            # "auto" would ask the hub whether the vocabulary was changed; the control tokens' rows are saved anyway
            model.network.save_pretrained(temporary, selected_adapters=["default"], save_embedding_layers=False)
            (temporary / "README.md").unlink()  # PEFT's model card, an empty form
        if weights:
            save_file(weights, temporary / TRAINED_FILE)
        (temporary / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_trained(model, folder, strategy):
    """Put trained weights into a base model loaded with the same settings. Raises InputError when they do not fit."""
    folder = Path(folder)
    with _loading(f"adapter {folder}"):
        if strategy != "full":
            _load_adapter(model, folder)
        if parameters := _outside_adapter(model, strategy):
            weights = _read_weights(folder / TRAINED_FILE)
            _check_fit(weights, parameters)
            for name, parameter in parameters.items():
                parameter.data = weights[name].to(parameter.device)
    model.eval()


def _load_adapter(model, folder):
    config = _read_config(folder)
    config.inference_mode = True
    if config.trainable_token_indices != {"embed_tokens": control_token_ids(model.tokenizer)}:
        raise ValueError("its control tokens are not this base model's")
    model.network = _attach(model.network, config)
    _load_exactly(model.network, _read_weights(folder / ADAPTER_FILE))
    merge_rows(model)


def merge_rows(model):
    """Put the trained rows of the control tokens into the embedding matrix, for good.

    Else PEFT would copy the whole matrix in every decoding step, twice.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()


def _outside_adapter(model, strategy):
    """{name: parameter} of what a strategy trains besides the adapter."""
    patterns = [PARAMETER_GROUPS[group] for group in STRATEGIES[strategy] if group not in ADAPTER_GROUPS]
    return {name: p for name, p in model.core.named_parameters() if any(re.search(q, name) for q in patterns)}
