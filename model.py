"""What the model is, what trains, what the loss is, how it answers, and what is saved.

    waveform -> log-mel -> audio encoder -> projector ─┐
    <|APA|> or <|MDD|> -> a trained vector ────────────┼─> language model (+ LoRA) -> logits -> answer
    <|user|> ...prompt... -> embedding rows ───────────┘

The language model of Phi-4-multimodal never heard speech by itself: it hears through a speech LoRA that the checkpoint
ships in `speech-lora/` (rank 320). There are three ways to use it (`--speech-adapter`):

    continue  train that adapter itself; the paper's wording "the (speech) LoRA layers" (3.2)
    merge     fold it into the frozen weights and train a fresh LoRA on top; where those weights are quantised, which
              would round it away, keep it beside them, frozen
    none      leave it out

and two strategies: "lora" trains LoRA alone, "unfreeze" also audio encoder and projector (paper 3.2). The vectors of
the two control tokens train under both (our choice: the paper does not say how they enter the tokenizer).

Shapes: B rows, T tokens of a row, A audio embeddings of a recording, F feature frames, D hidden size, H hidden size of
the audio encoder, N supervised positions, V vocabulary.
"""

from collections.abc import Sequence
import json
from pathlib import Path
import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

import data
import prompts
from support import cli, files, pretrained

FROZEN_SPEECH = "speech"  # name of the shipped adapter inside the network where it stays beside quantised weights

# A regex, because "all-linear" or name suffixes would also hit the audio encoder: its modules have the same names.
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
TRAINED = {  # what parameters' names contain; see `set_trainable`
    "LoRA": r"\.lora_[AB]\.default\.",
    "control tokens": r"^control$",
    "audio encoder": r"\.audio_embed\.encoder\.",
    "audio projector": r"\.audio_embed\.(up|down)_proj_for_speech\.",
}
STRATEGIES = {"lora": ("LoRA", "control tokens"), "unfreeze": tuple(TRAINED)}  # paper 3.2

TRAINED_FILE = "trained.safetensors"  # trained weights outside PEFT's adapter
UNMOVED = 1e-4  # share of a layer's norm; our choice: below a fortieth of what bfloat16 can tell apart
MAX_ENCODER_TOKENS = 500  # 40 s; what is longer goes through the conformer blocks in chunks of this length
KEPT_AUDIO = 4 * 2**30  # bytes; our choice: speechocean762's train part takes 0.8 GB in bfloat16


class SpeechModel(nn.Module):
    """The network with its tokenizer and feature extractor, and the control tokens' vectors (paper 3.2)."""

    def __init__(
        self,
        network: Phi4MultimodalForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        extractor: Phi4MultimodalFeatureExtractor,
    ) -> None:
        super().__init__()
        self.network = network  # or, later, a PeftModel around it
        self.tokenizer, self.extractor = tokenizer, extractor
        self.tokenizer.add_tokens(list(prompts.CONTROL_TOKENS.values()), special_tokens=True)
        self.control_ids = tokenizer.convert_tokens_to_ids([prompts.CONTROL_TOKENS[task] for task in prompts.TASKS])
        self.audio_id, self.pad_id = network.config.audio_config.audio_token_id, network.config.pad_token_id
        # Put in like audio, so that the matrix stays as it is, whole and frozen
        self.control = nn.Parameter(control_start(self)[0])  # (2, D)
        self.checkpoint = None
        self.started_from = None  # folder of the shipped adapter, where that is what trains
        self.keep_audio = False  # whether what is heard is kept in memory, for the epochs to come
        self.kept = {}  # utterance id -> embeddings (A, D), or features (F, 80) where the audio encoder trains

    @property
    def core(self) -> Phi4MultimodalForCausalLM:
        """The Phi4MultimodalForCausalLM, adapter layers included."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def audio(self) -> nn.Module:
        """Audio encoder and projector."""
        return self.core.model.embed_tokens_extend.audio_embed

    @property
    def device(self) -> torch.device:
        return self.core.device

    def hear(self, utterances: Sequence[data.Utterance]) -> list[torch.Tensor]:
        """Embeddings of each utterance's recording, a list of (A, D).

        While the audio encoder is frozen each is computed alone: sums in a batch are rounded by the batch's shape, and
        an evaluation with another batch size, or a resumed run, would differ in the last bits. Where it trains, only
        features are kept. What is beyond KEPT_AUDIO is made again each time.
        """
        trains, found = self.audio.up_proj_for_speech.weight.requires_grad, []
        for utterance in utterances:
            if utterance.id not in self.kept:
                made = torch.as_tensor(data.log_mel(utterance, self.extractor))  # (F, 80)
                if not trains:
                    with torch.no_grad():
                        (made,) = encode_audio(self.audio, [made])  # (A, D)
                if self.keep_audio and sum(kept.nbytes for kept in self.kept.values()) + made.nbytes <= KEPT_AUDIO:
                    self.kept[utterance.id] = made.cpu()
            else:
                made = self.kept[utterance.id]
            found.append(made.to(self.device))
        return list(encode_audio(self.audio, found)) if trains else found

    def embed(self, input_ids: torch.Tensor, audio: Sequence[torch.Tensor]) -> torch.Tensor:
        """Token embeddings (B, T, D) with audio and control tokens in their places.

        input_ids: (B, T); audio: list of (A, D), of the rows in order; of one without a recording empty, or left out.
        """
        embeds = self.core.get_input_embeddings()(input_ids)
        places = input_ids == self.audio_id  # (B, T)
        counts, lengths = (list(filter(None, found)) for found in (places.sum(dim=1).tolist(), map(len, audio)))
        if counts != lengths:
            raise ValueError(f"rows with {counts} audio placeholders for {lengths} audio embeddings")
        if lengths:
            embeds = embeds.index_put(places.nonzero(as_tuple=True), torch.cat([*audio]).to(embeds.dtype))
        for token, vector in zip(self.control_ids, self.control.to(embeds.dtype)):
            embeds = torch.where((input_ids == token)[..., None], vector, embeds)
        return embeds

    def loss(self, batch: data.MicroBatch, audio: Sequence[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy summed over the supervised tokens of a micro-batch (paper 4.2).

        The caller divides by the supervised tokens of the whole step, so that every token counts alike however the
        step is cut. Logits exist at supervised positions only: with a vocabulary of 200,064 they are the largest
        tensor of a step, and most positions hold prompt or audio. Rows are padded on the right, so causal attention
        needs no mask, and the faster kernels take none.

        audio: list of (A, D), one for each row that has a recording.
        """
        following = torch.from_numpy(batch.labels)[:, 1:]  # position t predicts token t+1
        supervised = (following != data.IGNORE).nonzero(as_tuple=True)  # found on the CPU: the GPU is not waited for
        rows, positions = (index.to(self.device, non_blocking=True) for index in supervised)
        embeds = self.embed(torch.from_numpy(batch.input_ids).to(self.device, non_blocking=True), audio)
        hidden = self.core.model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # (B, T, D)
        logits = self.core.lm_head(hidden[rows, positions])  # (N, V)
        return F.cross_entropy(logits.float(), following[supervised].to(self.device), reduction="sum")


@torch.no_grad()
def control_start(model: SpeechModel) -> tuple[torch.Tensor, str]:
    """Where the control tokens' vectors start (2, D), and a line about it: at spare rows of the embedding matrix,
    or where one is next to nothing, at <|user|>'s.

    The model normalises a vector before it is read, so the gradient of one with a thousandth of the usual norm is
    a thousand times the usual one: it would rule the clipped norm of every step. Raises InputError where the matrix
    has no spare rows.
    """
    matrix = model.core.get_input_embeddings().weight  # (V, D)
    if max(model.control_ids) >= len(matrix):
        raise cli.InputError(f"the model has {len(matrix)} embedding rows, none to spare for the control tokens")
    tokens = dict(zip(prompts.CONTROL_TOKENS.values(), model.control_ids))
    small, line = pretrained.spare_rows(matrix, tokens)
    tokens |= dict.fromkeys(small, model.tokenizer.convert_tokens_to_ids(prompts.USER))
    return matrix[[*tokens.values()]].float(), line + "".join(
        f"; {token} starts from {prompts.USER}'s" for token in small
    )


def encode_audio(audio: nn.Module, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Audio encoder and projector: embeddings (A, D), A = ceil(F / 8), of each of the log-mel features (F, 80).

    A recording's embeddings do not depend on what it is batched with. transformers' own padded path does not give
    that: it adds a boolean mask to the attention bias, so padding is attended to, and the subsampling convolutions
    look past a recording's end. Here the convolutions run on each recording alone, and the conformer blocks, whose
    own convolutions are causal, on the padded batch with a 0 / -inf mask.
    """
    encoder, weight = audio.encoder, audio.up_proj_for_speech.weight
    features = [feature.to(weight.device, weight.dtype)[None] for feature in features]  # each (1, F, 80)
    parts = [encoder.embed(encoder.encoder_embedding(feature), None)[0][0] for feature in features]  # (A, H)
    chunks = [chunk for part in parts for chunk in part.split(MAX_ENCODER_TOKENS)]
    hidden = pad_sequence(chunks, batch_first=True)  # (B, longest A, H)
    lengths = torch.tensor([len(chunk) for chunk in chunks], device=hidden.device)
    padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]  # (B, A)
    mask = hidden.new_zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None]  # (B, 1, 1, A)
    attention_mask = mask + encoder.relative_attention_bias_layer(hidden)  # (B, heads, A, A)
    for block in encoder.encoders:
        if encoder.gradient_checkpointing:  # transformers' own does not reach these blocks
            hidden = checkpoint(block, hidden, attention_mask, use_reentrant=False)
        else:
            hidden = block(hidden, attention_mask)
    hidden = audio.down_proj_for_speech(F.gelu(audio.up_proj_for_speech(hidden[~padding])))  # (sum of A, D)
    return hidden.split([len(part) for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# Answering


def question(model: SpeechModel, utterance: data.Utterance, task: str, control_token: bool = True) -> data.Example:
    """An example without an answer."""
    prompt = data.encode_prompt(utterance, task, model.tokenizer, model.audio_id, control_token)
    return data.Example(utterance, task, prompt, [])


@torch.no_grad()
def answer(
    model: SpeechModel,
    utterances: Sequence[data.Utterance],
    scoring: Sequence[str] = ("greedy",),
    max_new_tokens: int = data.MAX_NEW_TOKENS,
    control_token: bool = True,
    tasks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl for some utterances, as dicts.

    scoring: of APA, "greedy" for the answer that the model writes, "expected" for the probability of each score;
    without "greedy" the output is made of the likeliest scores, and there are no "tokens" and "truncated".
    tasks: where they are not those that an utterance has labels for.
    """
    lines = {}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        heard = model.hear(utterances)
        for task in prompts.TASKS:  # each by itself: APA's prompts are three times as long as MDD's
            chosen = [i for i, u in enumerate(utterances) if task in (tasks or u.tasks)]
            asked = [question(model, utterances[i], task, control_token) for i in chosen]
            audio = [heard[i] for i in chosen]
            for i in chosen:
                own = {"id": utterances[i].id, "task": task, "speaker": utterances[i].speaker, "output": None}
                lines[i, task] = own | {"reference": data.reference(utterances[i], task)}
            own = [lines[i, task] for i in chosen]
            if own and (task != "APA" or "greedy" in scoring):
                for line, (text, tokens, cut) in zip(own, generate(model, asked, audio, max_new_tokens)):
                    line |= {"output": text, "tokens": tokens, "truncated": cut}
            if own and task == "APA" and "expected" in scoring:
                for line, values in zip(own, score_distributions(model, asked, audio).tolist()):
                    line["scores"] = dict(zip(prompts.SCORES, values))
                    likeliest = {name: value.index(max(value)) for name, value in line["scores"].items()}
                    line["output"] = line["output"] or prompts.apa_target(likeliest)
    return [lines[key] for key in sorted(lines)]


def _padded_left(model, questions, audio):
    """Embedded prompts (B, T, D), and the mask (B, T) of what is no padding; all rows end together."""
    rows = [
        model.embed(torch.tensor([question.prompt_ids], device=model.device), [heard])[0]
        for question, heard in zip(questions, audio)
    ]  # (T, D)
    ones = [torch.ones(len(row), dtype=torch.long, device=model.device) for row in rows]
    return (pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, ones))


@torch.no_grad()
def generate(
    model: SpeechModel, questions: Sequence[data.Example], audio: Sequence[torch.Tensor], max_new_tokens: int
) -> list[tuple[str, int, bool]]:
    """Greedy answers to a batch of questions, as (text, number of tokens, truncated).

    audio: list of (A, D), one for each question. truncated: the limit came before <|end|>.
    """
    stop = [model.tokenizer.convert_tokens_to_ids(prompts.END), model.tokenizer.eos_token_id]
    embeds, mask = _padded_left(model, questions, audio)
    written = model.core.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=model.pad_id,
    )  # (B, new tokens)
    answers = []
    for ids in written.tolist():
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        answers.append((model.tokenizer.decode(ids[:end]), len(ids) if end is None else end + 1, end is None))
    return answers


@torch.no_grad()
def score_distributions(
    model: SpeechModel, questions: Sequence[data.Example], audio: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Probabilities of the values 0-10 for each score of an answer, (B, 4, 11). questions: APA's.

    The answer's text is given up to a score, the distribution of the next token is read at the eleven values and
    normalised over them, and the likeliest value is given as the model's own before the next score is read: four
    short passes with one cache, and no output that could be malformed. audio: list of (A, D), one a question.
    """
    before, values = data.encode_score_slots(model.tokenizer)
    values = torch.tensor(values, device=model.device)  # (11,)
    head = model.core.lm_head.weight[values].float()  # (11, D); in bfloat16 the likeliest two are often equal
    embeds, mask = _padded_left(model, questions, audio)
    found, cache = [], None
    for text in before:
        tokens = torch.tensor(text, device=model.device).expand(len(questions), -1)  # (B, n)
        if found:
            tokens = torch.cat([values[found[-1].argmax(dim=-1)][:, None], tokens], dim=1)
        following = model.core.get_input_embeddings()(tokens)
        embeds = following if found else torch.cat([embeds, following], dim=1)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -embeds.shape[1] :]  # padding counts nowhere
        output = model.core.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        # no product of matrices: autocast would round it
        scores = (output.last_hidden_state[:, -1:].float() * head).sum(dim=-1)  # (B, 11)
        found.append(scores.softmax(dim=-1))
    return torch.stack(found, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def default_dtype() -> str:
    """Type of frozen weights where none is asked for."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def load_base(
    checkpoint: pretrained.Checkpoint, dtype: str, attention: str, speech_adapter: str, quantize: str | None = None
) -> SpeechModel:
    """The pretrained model; with "merge", the speech adapter is folded in.

    dtype: "float32" or "bfloat16"; attention: of the language model, "sdpa", "eager" or "flash_attention_2"; quantize:
    None, or "nf4" for the language model's layers.
    Weights are read from safetensors alone, and no code of the checkpoint is run. Raises InputError when the
    checkpoint cannot be loaded.
    """
    pretrained.fetch(checkpoint)
    tokenizer, extractor = pretrained.load_reading(checkpoint)
    network = pretrained.load_network(checkpoint, dtype, attention, four_bits=quantize is not None)
    network.name_or_path = checkpoint.name  # what PEFT writes beside an adapter, not the folder in the hub's cache
    speech = checkpoint.folder / pretrained.SPEECH_ADAPTER
    if speech_adapter == "merge":
        config = pretrained.read_config(speech)
        config.lora_dropout = 0.0
        network = _add_lora(network, config, speech, FROZEN_SPEECH)
        if quantize:
            for key, parameter in network.named_parameters():
                if ".lora_" in key:
                    parameter.data = parameter.data.to(getattr(torch, dtype))
        else:
            network = pretrained.fold(network)
    network.requires_grad_(False)
    model = SpeechModel(network, tokenizer, extractor)
    model.checkpoint = checkpoint
    model.started_from = speech if speech_adapter == "continue" else None
    return model


def _add_lora(network, config, folder=None, name="default"):
    """The network with a LoRA, fresh or with the weights in `folder`; a frozen speech adapter stays active."""
    config.target_modules = LORA_TARGETS  # the shipped list of suffixes would also hit the audio encoder
    with pretrained.loading(f"adapter {folder}"):
        if isinstance(network, PeftModel):
            network.add_adapter(name, config)
            network.base_model.set_adapter([FROZEN_SPEECH, name])
        else:
            network = get_peft_model(network, config, adapter_name=name)
        if folder:
            pretrained.load_exactly(network, pretrained.read_adapter(folder), name)
    return network


def add_adapter(model: SpeechModel, rank: int, alpha: int, dropout: float) -> LoraConfig:
    """Put the LoRA that is to be trained into the model: a fresh one, or the shipped one with "continue".

    rank, alpha and dropout are the fresh one's. Returns the configuration of the adapter.
    """
    if model.started_from:
        config = pretrained.read_config(model.started_from)
        config.inference_mode = False
    else:
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM")
    config.revision = model.checkpoint.commit if model.checkpoint else None
    model.network = _add_lora(model.network, config, model.started_from)
    return config


def load_trained(model: SpeechModel, folder: Path, strategy: str) -> None:
    """Put trained weights into a base model loaded with the same settings. Raises InputError when they do not fit."""
    config = pretrained.read_config(folder)
    config.inference_mode = True
    model.network = _add_lora(model.network, config, folder)
    own = _outside_adapter(model, strategy)
    with pretrained.loading(f"adapter {folder}"):
        weights = pretrained.read_weights(folder / TRAINED_FILE)
        pretrained.check_fit(weights, own)
    for name, parameter in own.items():
        parameter.data = weights[name].to(parameter.device)
    model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# What trains


def set_trainable(model: SpeechModel, strategy: str) -> dict[str, int]:
    """Freeze everything, then open the parameters of the strategy. Returns {group: number of parameters}.

    Trained parameters are kept in float32: a step of 2e-5 is lost in bfloat16's 8 bits of precision.
    Raises ValueError when a group matches nothing.
    """
    model.requires_grad_(False)
    counts = {}
    for group in STRATEGIES[strategy]:
        chosen = [p for name, p in model.named_parameters() if re.search(TRAINED[group], name)]
        if not chosen:
            raise ValueError(f"strategy {strategy!r}: no parameter belongs to group {group!r}")
        for parameter in chosen:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        counts[group] = sum(parameter.numel() for parameter in chosen)
    return counts


def trained_parameters(model: SpeechModel) -> dict[str, nn.Parameter]:
    """{name: parameter} of what trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _outside_adapter(model, strategy):
    """{name: parameter} of what a strategy trains besides LoRA; names as in the checkpoint, and "control"."""
    patterns = [TRAINED[group] for group in STRATEGIES[strategy] if group != "LoRA"]
    own = {"control": model.control, **dict(model.core.named_parameters())}
    return {name: p for name, p in own.items() if any(re.search(pattern, name) for pattern in patterns)}


@torch.no_grad()
def moved(model: SpeechModel) -> tuple[float, float]:
    """How far training has moved what trains: an adapter that changes nothing is the most frequent complaint.

    Returns the median over LoRA's layers of |alpha/r (BA - B0 A0)| / |W|, and the mean over the control tokens of
    |v - v0| / |v0|; B0 A0 is the shipped adapter where that is trained on, else 0.
    """
    started = pretrained.read_adapter(model.started_from) if model.started_from else {}
    changes = []
    for name, layer in model.core.named_modules():
        if isinstance(layer, LoraLayer):
            change = layer.get_delta_weight("default").float()  # (out, in)
            if started:
                a, b = (started[f"base_model.model.{name}.lora_{side}.weight"].to(change) for side in "AB")
                change -= layer.scaling["default"] * (b @ a)
            weight = dequantize_module_weight(layer.get_base_layer())
            changes.append(change.norm() / torch.linalg.vector_norm(weight, dtype=torch.float32))
    start, _ = control_start(model)
    vectors = (model.control - start).norm(dim=1) / start.norm(dim=1)  # (2,)
    return torch.stack(changes).median().item(), vectors.mean().item()


def describe_moved(model: SpeechModel) -> str:
    """`moved` as a sentence."""
    layers, vectors = moved(model)
    warning = ": next to nothing, so it is still the model it started from" if layers < UNMOVED else ""
    return f"the adapter has moved its layers by {layers:.2%} (median), the control tokens by {vectors:.2%}{warning}"


# ----------------------------------------------------------------------------------------------------------------------
# Saving

CARD = """\
---
library_name: peft
license: mit
{front}---

LoRA for English pronunciation evaluation after arXiv 2509.02915: epoch {epoch} on {data}, strategy `{strategy}`. It
fits `{model}` loaded in the way below, and no other base. settings.json has all settings. In a copy of the project:

    python evaluate.py --adapter FOLDER                      # scores it
    python -m analysis.export NEW_FOLDER --adapter FOLDER    # a checkpoint that transformers loads alone

```python
import model as models
from support import pretrained

base = pretrained.find({model!r}, {revision!r})
model = models.load_base(base, {dtype!r}, {attention!r}, {speech_adapter!r}, {quantize!r})
models.load_trained(model, FOLDER, {strategy!r})
```
"""


def save_trained(model: SpeechModel, folder: Path, settings: dict[str, Any]) -> None:
    """Write the trained weights, with settings and prompts beside them, whole or not at all; rank 0 alone.

    LoRA is written in PEFT's format; what else trained, in float32, goes to trained.safetensors.
    """
    if cli.process_rank():
        return
    weights = _outside_adapter(model, settings["strategy"])
    with files.whole(folder) as temporary:
        temporary.mkdir()
        # "auto" would ask the hub whether the vocabulary was changed
        model.network.save_pretrained(temporary, selected_adapters=["default"], save_embedding_layers=False)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, temporary / TRAINED_FILE
        )
        asked = {task: prompts.build_prompt(task) for task in prompts.TASKS}
        (temporary / "prompts.json").write_text(json.dumps(asked, indent=2) + "\n")
        front = f"base_model: {settings['model']}\n" if settings["revision"] else ""  # a folder is no id of the hub
        (temporary / "README.md").write_text(CARD.format(**settings, front=front))
        (temporary / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
