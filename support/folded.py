"""Folded weights: what the weights of a checkpoint are after training, one at a time, without building the network.

To the weights as training held them (in its type, with a merged adapter, or in 4 bits) what was learnt is added in
float32, and the sum is rounded once. Weights have the names that they have in the checkpoint's files.
"""

from dataclasses import dataclass
import json
import math
import re

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
import torch

from support import four_bits, pretrained

LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
ROWS = re.compile(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta")


@dataclass
class Adapter:
    """An adapter in PEFT's format: LoRA and rows of an embedding."""

    pairs: dict  # name of a weight (out, in) -> {"A": (r, in), "B": (out, r)}
    scaling: float
    rows: dict  # name of a weight (V, D) -> (tokens, their rows (tokens, D))

    def delta(self, name):
        """What is added to a weight, (out, in) in float32."""
        return self.scaling * (self.pairs[name]["B"].float() @ self.pairs[name]["A"].float())


def read_adapter(folder):
    """The Adapter in a folder. Raises InputError for what is none."""
    config, pairs, rows = pretrained.read_config(folder), {}, {}
    with pretrained.loading(f"adapter {folder}"):
        for key, weight in pretrained.read_adapter(folder).items():
            if found := LORA.fullmatch(key):
                pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = weight
            elif found := ROWS.fullmatch(key):
                rows[f"{found[1]}.weight"] = config.trainable_token_indices[found[1].split(".")[-1]], weight
            else:
                raise ValueError(f"{key} is neither LoRA nor rows of an embedding")
    return Adapter(pairs, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r), rows)


@dataclass
class Measured:
    """Squared norms over all trained matrices, but for rows of an embedding."""

    began: float = 0.0  # the weights when training began
    learnt: float = 0.0  # what training added
    lost: float = 0.0  # what rounding took from the sum
    checkpoint: float = 0.0  # the weights before they were kept in 4 bits
    quantised: float = 0.0  # what 4 bits took from them
    changed: bool = False  # whether any weight differs after rounding

    def share(self, part, whole):
        return math.sqrt(getattr(self, part) / getattr(self, whole)) if getattr(self, whole) else 0.0


class Folded:
    """A checkpoint's weights as training left them.

    folder: of the checkpoint; held, dtype: "float32" or "bfloat16", in training and of the result; layers: regex of
    those that have LoRA; merged: Adapters that were folded into the weights before training; before, after: those that
    stood beside them when training began, and now; replaced: file of weights that were trained themselves, or None;
    quantised: whether the layers were kept in 4 bits. Raises InputError where these do not fit together.
    """

    def __init__(self, folder, held, dtype, layers, merged, before, after, replaced=None, quantised=False):
        self.held, self.dtype = getattr(torch, held), getattr(torch, dtype)
        self.layers, self.quantised = re.compile(rf"({layers})\.weight"), quantised
        self.merged, self.before, self.after, self.measured = merged, before, after, Measured()
        with pretrained.loading(f"checkpoint {folder}"):
            self.frozen = _listed(folder / file for file in pretrained.weight_files(folder))
        with pretrained.loading(f"what was trained, on the checkpoint {folder},"):
            self.trained = _listed([replaced] if replaced else [])
            for name, (_, shape) in self.trained.items():
                self._check(name, shape)
            for adapter in (*merged, *before, *after):
                if different := adapter.pairs.keys() ^ filter(self.layers.fullmatch, self.frozen):
                    raise ValueError(f"{len(different)} layers differ, such as {min(different)}")
                for name, pair in adapter.pairs.items():
                    self._check(name, [len(pair["B"]), pair["A"].shape[1]])

    def _check(self, name, shape):
        if name not in self.frozen or self.frozen[name][1] != [*shape]:
            raise ValueError(f"{name} {[*shape]} is none of its weights")

    def empty(self):
        """{name: a tensor of the type and shape that the weight will have, which holds nothing}."""
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, (_, shape) in self.frozen.items()}

    @torch.no_grad()
    def fold(self, name):
        """One weight, in `dtype`; counted in `measured`. Raises ValueError where it is not finite."""
        weight = _read(self.frozen, name, self.held)
        for adapter in self.merged:
            if name in adapter.pairs:
                weight = (weight.float() + adapter.delta(name)).to(self.held)
        if self.quantised and self.layers.fullmatch(name):
            held = four_bits.rounded(weight)
            self.measured.checkpoint += _square(weight)
            self.measured.quantised += _square(held.float() - weight.float())
            weight = held
        deltas = {id(a): a.delta(name) for a in (*self.before, *self.after) if name in a.pairs}
        if deltas or name in self.trained:
            began = weight.float() + sum(deltas.get(id(adapter), 0) for adapter in self.before)
            now = weight.float() + sum(deltas.get(id(adapter), 0) for adapter in self.after)
            if name in self.trained:
                now = _read(self.trained, name, torch.float32)
            weight = now.to(self.dtype)
            if not torch.equal(now, began):
                self._measure(began, now, weight)
        weight = weight.to(self.dtype)
        for adapter in self.after:
            if name in adapter.rows:
                tokens, rows = adapter.rows[name]
                weight = weight.index_copy(0, torch.tensor(tokens), rows.to(self.dtype))
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
        return weight

    def _measure(self, began, now, rounded):
        self.measured.began += _square(began)
        self.measured.learnt += _square(now - began)
        self.measured.lost += _square(rounded.float() - now)
        self.measured.changed |= not torch.equal(rounded, began.to(self.dtype))

    def write(self, folder, names, size):
        """Write all weights, under new names, in files of about `size` bytes, of which one is in memory at a time."""
        empty = self.empty()
        old = {names[name]: name for name in empty}
        split = split_torch_state_dict_into_shards({names[n]: w for n, w in empty.items()}, max_shard_size=size)
        for file, held in split.filename_to_tensors.items():
            save_file({name: self.fold(old[name]).contiguous() for name in held}, folder / file, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / pretrained.WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _listed(paths):
    """{name of a weight: (safetensors file that it is in, its shape)}; no weight is read yet."""
    found = {}
    for path in sorted(paths):
        with safe_open(path, "pt") as file:
            found |= {name: (path, file.get_slice(name).get_shape()) for name in file.keys()}
    return found


def _read(listed, name, dtype):
    """A weight. Its file is opened for it alone: what was read from an open one stays in memory."""
    with safe_open(listed[name][0], "pt") as file:
        return file.get_tensor(name).to(dtype)


def _square(weight):
    return torch.linalg.vector_norm(weight, dtype=torch.float32).item() ** 2
