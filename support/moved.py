"""How far training has moved a model: an adapter that changes nothing is the most frequent complaint."""

from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
import torch

UNMOVED = 1e-4  # share of a layer's norm; our choice: below a fortieth of what bfloat16 can tell apart


@torch.no_grad()
def measure(network, started):
    """How far training has moved the layers that the adapter sits on, and the rows of the control tokens.

    Returns {"adapter_moved": median over layers of |alpha/r (BA - B0 A0)| / |W|, "control_tokens_moved": mean over the
    tokens of |row - row0| / |row0|}; B0 A0 is the shipped adapter where that is trained on ("continue"), else 0.
    network: with PEFT's layers; started: the shipped adapter's weights by name, empty for a fresh adapter.
    """
    changes = []
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (side["default"].weight.double() for side in (layer.lora_A, layer.lora_B))  # (r, in), (out, r)
            if started:
                a0, b0 = (started[f"base_model.model.{name}.lora_{side}.weight"].to(a) for side in "AB")
                a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
            change = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()  # |BA| without BA, which is as large as W
            weight = dequantize_module_weight(layer.get_base_layer())
            changes.append(layer.scaling["default"] * change / torch.linalg.vector_norm(weight, dtype=torch.float32))
    tokens = network.get_input_embeddings().token_adapter
    row, row0 = (rows["default"].float() for rows in (tokens.trainable_tokens_delta, tokens.trainable_tokens_original))
    return {
        "adapter_moved": torch.stack(changes).median().item(),
        "control_tokens_moved": ((row - row0).norm(dim=1) / row0.norm(dim=1)).mean().item(),
    }


def describe(moved):
    """The dict of `measure` as a sentence."""
    layers, rows = moved["adapter_moved"], moved["control_tokens_moved"]
    warning = ": next to nothing, so it is still the model it started from" if layers < UNMOVED else ""
    return f"the adapter has moved its layers by {layers:.2%} (median), the control tokens' rows by {rows:.2%}{warning}"
