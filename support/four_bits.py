"""Four bits: QLoRA's storage of frozen layers."""

import re

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from support import cli


def nf4():
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


def check_quantised(network, layers):
    """All of the language model's linear layers and no others must be quantised; raises ValueError.

    layers: regex of their names. A name in a skip list counts from the start of the module's name, so
    "embed_tokens_extend" without "model." skips nothing.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in network.named_modules():
        expected = bool(re.fullmatch(layers, name))
        if isinstance(module, nn.Linear) and isinstance(module, Linear4bit) != expected:
            raise ValueError(
                f"{name} is a {type(module).__name__}: nf4 is for the language model's layers, all of them"
            )
