"""Rows of an embedding matrix that train while the matrix is frozen, without a copy of it.

PEFT's layer copies the matrix with the rows put in, for the embedding and once more for the head, and the gradient is
as large: 1.2 GB each at full size. These functions give the same numbers from the frozen matrix and the few rows.

Shapes: D hidden size.
"""

from peft.utils.other import TrainableTokensWrapper
import torch
import torch.nn.functional as F


def trained_rows(layer):
    """An embedding or head as it is frozen, and {token: row (D,)} of what PEFT trains of it and has not merged."""
    if not isinstance(layer, TrainableTokensWrapper):
        return layer, {}
    adapter = layer.token_adapter
    if adapter.merged:
        return adapter.base_layer, {}  # not the wrapper, whose `weight` is a copy even then
    return adapter.base_layer, dict(zip(adapter.token_indices["default"], adapter.trainable_tokens_delta["default"]))


def rows_of(layer, tokens):
    """The rows (..., D) that some tokens have in an embedding or head."""
    frozen, trained = trained_rows(layer)
    found = F.embedding(tokens, frozen.weight)
    for token, row in trained.items():
        found = torch.where((tokens == token)[..., None], row.to(found.dtype), found)
    return found


def merge(model):
    """Put the trained rows of the control tokens into the embedding matrix, for good.

    Else PEFT would copy the whole matrix in every decoding step, twice.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()
