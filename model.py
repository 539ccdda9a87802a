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

from copy import copy
from dataclasses import replace
import json
from pathlib import Path
import re

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import data
import prompts
from support import audio_cache, cards, cli, files, moved, pretrained, processes, token_rows, workers

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
MAX_ENCODER_TOKENS = 500  # 40 s; what is longer goes through the conformer blocks in chunks of this length
CANDIDATES = 16  # likeliest tokens by bfloat16 logits that are compared in float32; a tie of more was never seen


# ----------------------------------------------------------------------------------------------------------------------
# SpeechModel, in three parts: it hears, it learns, it answers


class HearingModel(nn.Module):
    """The network with its tokenizer and feature extractor: recordings become embeddings (paper 3.2)."""

    def __init__(self, network, tokenizer, extractor):
        super().__init__()
        self.network = network  # Phi4MultimodalForCausalLM, or a PeftModel around it
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.source = None  # (folder, commit at the hub, speech adapter) of load_base
        self.started_rows = []  # control tokens that load_base started from another row
        self.prepare = workers.Preparation(extractor, self.pad_id, self.audio_id)

    @property
    def core(self):
        """The Phi4MultimodalForCausalLM, adapter layers included."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @property
    def audio(self):
        """Audio encoder and projector."""
        return self.core.model.embed_tokens_extend.audio_embed

    @property
    def layers(self):
        """The blocks that hold nearly all weights: of the language model, and of the audio encoder."""
        return [*self.core.model.layers, *self.audio.encoder.encoders]

    @property
    def device(self):
        return self.core.device

    @property
    def audio_id(self):
        return self.core.config.audio_config.audio_token_id

    @property
    def pad_id(self):
        return self.core.config.pad_token_id

    def encode_audio(self, features):
        """Audio encoder and projector, so that a recording's embeddings do not depend on what it is batched with.

        transformers' own padded path does not give that: it adds a boolean mask to the attention bias, so padding is
        attended to, and the subsampling convolutions look past a recording's end. Here the convolutions run on each
        recording alone, and the conformer blocks, whose own convolutions are causal, on the padded batch with a
        0 / -inf mask. A chunk of a recording above 40 s is a row of that batch like any other, so processes that share
        the weights (FSDP2) call each block equally often, whatever the lengths of their recordings.

        features: list of log-mel features, each (F, 80). Returns a tuple of (A, D), A = ceil(F / 8).
        """
        audio, encoder = self.audio, self.audio.encoder
        weight = audio.up_proj_for_speech.weight
        features = [feature.to(weight.device, weight.dtype)[None] for feature in features]  # each (1, F, 80)
        parts = [encoder.embed(encoder.encoder_embedding(feature), None)[0][0] for feature in features]  # (A, H)
        hidden = self._conform([chunk for part in parts for chunk in part.split(MAX_ENCODER_TOKENS)])  # (sum of A, H)
        return audio.down_proj_for_speech(F.gelu(audio.up_proj_for_speech(hidden))).split([len(p) for p in parts])

    def _conform(self, chunks):
        """The conformer blocks on a list of (A, H). Returns their outputs laid end to end, (sum of A, H)."""
        encoder = self.audio.encoder
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

    def hear(self, utterances):
        """Embeddings of each utterance's recording, a list of (A, D)."""
        return self.embed_recordings([self.prepare.recording(utterance) for utterance in utterances])

    def embed_recordings(self, recordings):
        """Embeddings of each workers.Recording, a list of (A, D).

        While nothing there trains each is computed alone: sums in a batch are rounded by the batch's shape, and a run
        that was resumed, or an evaluation with another batch size, would differ in the last bits.
        """
        if self._audio_trains:
            return self.encode_audio([recording.features for recording in recordings])
        return [self._known(recording).to(self.device, non_blocking=True) for recording in recordings]

    @torch.no_grad()
    def _known(self, recording):
        """Embeddings (A, D) of one recording: from its micro-batch, from disk, or computed and kept there."""
        cache, file = self.prepare.cache, recording.file
        embeddings = recording.embeddings
        if embeddings is None and file:
            embeddings = cache.read(file)  # it may have come since the micro-batch was prepared
        if embeddings is None:
            (embeddings,) = self.encode_audio([recording.features])
            if file:
                cache.write(file, embeddings.cpu())
        return embeddings

    def keep_audio(self, folder):
        """Keep audio embeddings in `folder`, and read them from there, while nothing trains that makes them."""
        if not self._audio_trains:
            self.prepare.cache = audio_cache.AudioCache(Path(folder) / audio_cache.digest(self.audio, self.extractor))

    @property
    def _audio_trains(self):
        return self.audio.up_proj_for_speech.weight.requires_grad


class LearningModel(HearingModel):
    """Gives the loss (paper 4.2)."""

    def forward(self, batch):
        """Summed loss of a data.MicroBatch with its recordings; see `loss`."""
        return self.loss(batch, self.embed_recordings(batch.recordings))

    def _fill_in(self, input_ids, placeholders, audio):
        """Token embeddings with the audio embeddings in the place of their placeholders, (B, T, D).

        placeholders: (P,), positions in the rows laid end to end; audio: list of (A, D).
        """
        embeds = token_rows.rows_of(self.core.get_input_embeddings(), input_ids)  # (B, T, D)
        audio = torch.cat(audio).to(embeds.dtype)  # (sum of A, D)
        if len(placeholders) != len(audio):
            raise ValueError(f"{len(placeholders)} audio placeholders for {len(audio)} audio embeddings")
        return embeds.flatten(0, 1).index_copy(0, placeholders, audio).view_as(embeds)

    def _logits(self, hidden):
        """Logits (N, V) of hidden states (N, D)."""
        head, trained = token_rows.trained_rows(self.core.lm_head)
        logits = head(hidden)
        for token, row in trained.items():
            logits[:, token] = F.linear(hidden, row.to(head.weight.dtype)[None])[:, 0]
        return logits

    def _exact_logits(self, hidden, tokens):
        """Logits (B, K) of some tokens (B, K) in float32, whatever type the weights have. hidden: (B, D).

        bfloat16 has 8 bits: logits between 16 and 32 are 0.125 apart, and the likeliest two are often equal.
        """
        rows = token_rows.rows_of(self.core.lm_head, tokens)  # (B, K, D)
        return (rows.float() * hidden.float()[:, None]).sum(dim=-1)

    def _likeliest(self, hidden):
        """The likeliest token (B,) after hidden states (B, D)."""
        logits = self._logits(hidden)  # (B, V)
        if logits.dtype == torch.float32:
            return logits.argmax(dim=-1)
        tokens = logits.topk(CANDIDATES).indices  # (B, CANDIDATES)
        return tokens.gather(1, self._exact_logits(hidden, tokens).argmax(dim=-1, keepdim=True))[:, 0]

    def loss(self, batch, audio):
        """Cross-entropy summed over the supervised tokens of a micro-batch.

        The caller divides by the supervised tokens of the whole step, so that every token counts alike however the
        step is cut. Logits exist at supervised positions only: with a vocabulary of 200,064 they are the largest
        tensor of a step, and most positions hold prompt or audio. Rows are padded on the right, so causal attention
        needs no mask, and the faster kernels take none.

        batch: data.MicroBatch; audio: list of (A, D), one for each row.
        """
        input_ids, placeholders, supervised, targets = (
            torch.as_tensor(array).to(self.device, non_blocking=True)
            for array in (batch.input_ids, batch.placeholders, batch.supervised, batch.targets)
        )
        hidden = self.core.model(
            inputs_embeds=self._fill_in(input_ids, placeholders, audio), use_cache=False
        ).last_hidden_state  # (B, T, D)
        logits = self._logits(hidden.flatten(0, 1)[supervised])  # (N, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def compile_layers(self):
        """Compile each layer of the language model, for micro-batches of any length."""
        for layer in self.core.model.layers:
            layer.compile(dynamic=True)

    def moved(self):
        """How far training has moved the adapter's layers; see moved.measure. Empty without an adapter."""
        folder, _, speech_adapter = self.source
        started = pretrained.read_adapter(folder / pretrained.SPEECH_ADAPTER) if speech_adapter == "continue" else {}
        return moved.measure(self.core, started) if isinstance(self.network, PeftModel) else {}


class SpeechModel(LearningModel):
    """Answers questions; what the rest of the project uses."""

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

        Each task's prompts are read apart: APA's are three times as long as MDD's, and padding takes as long as text.
        audio: list of (A, D), one for each example. Returns a list of (text, number of tokens, truncated); truncated:
        the limit came before <|end|>.
        """
        stop = {self.tokenizer.convert_tokens_to_ids(prompts.END), self.tokenizer.eos_token_id}
        written = [[] for _ in examples]  # token ids
        by_task = [[i for i, example in enumerate(examples) if example.task == task] for task in prompts.TASKS]
        read = [self._read_prompts([examples[i] for i in part], [audio[i] for i in part]) for part in by_task if part]
        rows = sum(by_task, [])  # of the batch: which example each is
        hidden, state = torch.cat([ends for ends, _ in read]), _join([state for _, state in read])
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
        batch = data.collate(examples, self.pad_id, self.audio_id)
        input_ids, placeholders = (
            torch.as_tensor(array).to(self.device) for array in (batch.input_ids, batch.placeholders)
        )
        output = self.core.model(inputs_embeds=self._fill_in(input_ids, placeholders, audio), use_cache=True)
        lengths = torch.tensor([len(example) for example in examples], device=self.device)
        mask = (torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]).long()  # (B, T)
        ends = output.last_hidden_state[torch.arange(len(examples), device=self.device), lengths - 1]
        return ends, (output.past_key_values, mask)

    def _read_on(self, tokens, state):
        """Read further tokens (B, n). Returns hidden states of the last ones (B, D), and the state after them."""
        cache, mask = state
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        output = self.core.model(
            inputs_embeds=token_rows.rows_of(self.core.get_input_embeddings(), tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :],  # padding counts nowhere
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1], (output.past_key_values, mask)


def _join(states):
    """One state of several: their rows one after the other, the shorter ones padded on the right."""
    cache, mask = max(states, key=lambda state: state[1].shape[1])  # its layers take the others in
    missing = [mask.shape[1] - shorter.shape[1] for _, shorter in states]
    for number, layer in enumerate(cache.layers):
        layers = [joined.layers[number] for joined, _ in states]
        layer.keys, layer.values = (
            torch.cat([F.pad(getattr(part, name), (0, 0, 0, pad)) for part, pad in zip(layers, missing)])
            for name in ("keys", "values")
        )
    return cache, torch.cat([F.pad(shorter, (0, pad)) for (_, shorter), pad in zip(states, missing)])


def _select(state, rows):
    """The state of `_read_on` for some rows of its batch, a list of their numbers."""
    cache, mask = state
    cache.batch_select_indices(torch.tensor(rows, device=mask.device))
    return cache, mask[rows]


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def default_dtype():
    """Type of frozen weights where none is asked for."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def load_base(name, revision, dtype, attention, speech_adapter, quantize=None):
    """The pretrained model, with the control tokens in its tokenizer; with "merge", the speech adapter is folded in.

    name: checkpoint folder or hub id (`revision` of the hub id); dtype: "float32" or "bfloat16"; attention: of the
    language model, "sdpa", "eager" or "flash_attention_2"; quantize: None, or "nf4" for the language model's layers.
    Weights are read from safetensors alone, and no code of the checkpoint is run. Raises InputError when the
    checkpoint cannot be loaded.
    """
    folder, commit = pretrained.fetch(name, revision)
    what = f"model {name!r}" + (f" (revision {revision})" if commit else "")
    tokenizer, extractor = pretrained.load_reading(folder, what)
    tokenizer.add_tokens(list(prompts.CONTROL_TOKENS.values()), special_tokens=True)
    network = pretrained.load_network(folder, what, dtype, attention, LORA_TARGETS if quantize else None)
    network.name_or_path = str(name)  # what PEFT writes beside an adapter, not the folder in the hub's cache
    if speech_adapter == "merge" and quantize:
        network = _with_speech_adapter(network, folder, FROZEN_SPEECH, lora_dropout=0.0)
        for key, parameter in network.named_parameters():
            if ".lora_" in key:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    elif speech_adapter == "merge":
        network = pretrained.fold(_with_speech_adapter(network, folder))
    rows = network.get_input_embeddings().weight.shape[0]
    if max(control_token_ids(tokenizer)) >= rows:
        raise cli.InputError(f"{what} has {rows} embedding rows, none to spare for the control tokens")
    network.requires_grad_(False)
    model = SpeechModel(network, tokenizer, extractor)
    model.source = (folder, commit, speech_adapter)
    tokens = dict(zip(prompts.CONTROL_TOKENS.values(), control_token_ids(tokenizer)))
    matrix = network.get_input_embeddings().weight
    model.started_rows, model.spare_rows = pretrained.spare_rows(matrix, tokens)
    for token in model.started_rows:
        matrix.data[tokens[token]] = matrix.data[tokenizer.convert_tokens_to_ids(prompts.USER)].clone()
    return model


def control_token_ids(tokenizer):
    """Ids of the control tokens, in the order of prompts.TASKS. They lie in spare rows of the embedding matrix."""
    return tokenizer.convert_tokens_to_ids([prompts.CONTROL_TOKENS[task] for task in prompts.TASKS])


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def _with_speech_adapter(network, folder, adapter_name="default", **changes):
    """The network with the shipped speech adapter; `changes` replace values of its configuration."""
    folder = folder / pretrained.SPEECH_ADAPTER
    config = pretrained.read_config(folder)
    config.target_modules = LORA_TARGETS  # the shipped list of suffixes would also hit the audio encoder
    for key, value in changes.items():
        setattr(config, key, value)
    network = get_peft_model(network, config, adapter_name=adapter_name)
    with pretrained.loading(f"speech adapter {folder}"):
        pretrained.load_exactly(network, pretrained.read_adapter(folder), adapter_name, new=r"trainable_tokens_delta")
    return network


def _attach(network, config):
    """Add the adapter that trains, or was trained. A frozen speech adapter stays active beside it."""
    if not isinstance(network, PeftModel):
        return get_peft_model(network, config)
    network.add_adapter("default", config)
    network.base_model.set_adapter([FROZEN_SPEECH, "default"])
    return network


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


# ----------------------------------------------------------------------------------------------------------------------
# What trains


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


def trained_parameters(model):
    """{name: parameter} of what trains; names are those inside the Phi4MultimodalForCausalLM."""
    return {name: parameter for name, parameter in model.core.named_parameters() if parameter.requires_grad}


def _outside_adapter(model, strategy):
    """{name: parameter} of what a strategy trains besides the adapter."""
    patterns = [PARAMETER_GROUPS[group] for group in STRATEGIES[strategy] if group not in ADAPTER_GROUPS]
    return {name: p for name, p in model.core.named_parameters() if any(re.search(q, name) for q in patterns)}


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def save_trained(model, folder, settings):
    """Write the trained weights, with the exact settings beside them, whole or not at all; collective.

    The adapter is written in PEFT's format. Trained weights outside of it ("unfreeze", "full") go to
    trained.safetensors: float32, but for "full" the type they will be used in (`--dtype`), half as large on a GPU.
    """
    dtype = getattr(torch, settings["dtype"]) if settings["strategy"] == "full" else torch.float32
    weights = {}
    for name, parameter in _outside_adapter(model, settings["strategy"]).items():
        if (weight := processes.on_rank_0(parameter)) is not None:
            weights[name] = weight.to(dtype).contiguous()
    if cli.process_rank():
        return
    with files.whole(Path(folder)) as temporary:
        temporary.mkdir()
        if isinstance(model.network, PeftModel):
            # "auto" would ask the hub whether the vocabulary was changed; the control tokens' rows are saved anyway
            model.network.save_pretrained(temporary, selected_adapters=["default"], save_embedding_layers=False)
            if cards.needs_more(settings):
                config = copy(model.network.peft_config["default"])
                config.target_modules = cards.GUARD
                config.save_pretrained(temporary)
        if weights:
            save_file(weights, temporary / TRAINED_FILE)
        (temporary / "README.md").write_text(cards.of_adapter(settings, LORA_TARGETS))
        (temporary / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_trained(model, folder, strategy):
    """Put trained weights into a base model loaded with the same settings. Raises InputError when they do not fit."""
    folder, what = Path(folder), f"adapter {folder}"
    if strategy != "full":
        config = pretrained.read_config(folder)
        config.inference_mode, config.target_modules = True, LORA_TARGETS  # a guard may stand there, see support/cards
        if config.trainable_token_indices != {"embed_tokens": control_token_ids(model.tokenizer)}:
            raise cli.InputError(f"{what}: its control tokens are not this base model's")
        model.network = _attach(model.network, config)
        with pretrained.loading(what):
            pretrained.load_exactly(model.network, pretrained.read_adapter(folder))
        token_rows.merge(model)
    if parameters := _outside_adapter(model, strategy):
        with pretrained.loading(what):
            weights = pretrained.read_weights(folder / TRAINED_FILE)
            pretrained.check_fit(weights, parameters)
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device)
    model.eval()
