"""Memory: what a run takes of it, and what is said where it is not enough."""

from contextlib import contextmanager
import re
import resource
import sys

import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from support import cli, hub


def of_full(network, patterns):
    """Bytes that training weights themselves takes, before activations: {what: bytes}.

    network: on any device, meta too; patterns: regexes of the names of the parameters that train.
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    trained = sum(size for name, size in sizes.items() if any(re.search(pattern, name) for pattern in patterns))
    return {
        "weights, gradients and Adam's moments": 16 * trained,  # float32
        "frozen weights": 2 * (sum(sizes.values()) - trained),  # bfloat16
        "autocast's copies of the weights": 2 * trained,  # bfloat16, from a forward pass to its backward pass
    }


def check_full(name, revision, patterns):
    """Stop before the weights are read when `--strategy full` cannot fit. patterns: see of_full."""
    memory = torch.cuda.get_device_properties(0).total_memory
    folder, _ = hub.fetch(name, revision, "model", ["config.json"])
    with torch.device("meta"):
        parts = of_full(Phi4MultimodalForCausalLM(Phi4MultimodalConfig.from_pretrained(folder)), patterns)
    if sum(parts.values()) > memory:
        listed = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in parts.items())
        raise cli.InputError(
            f"--strategy full takes {sum(parts.values()) / 1e9:.1f} GB before activations ({listed}), "
            f"and the GPU has {memory / 1e9:.1f}: share them with torchrun --nproc-per-node N and "
            f"--shard, or use --strategy unfreeze"
        )


@contextmanager
def advice(micro_batches, size):
    """Says what helps when the GPU's memory is not enough. size: --micro-batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise cli.RunError(
            f"out of memory with micro-batches of {size}, longest sequence {micro_batches[0].input_ids.shape[1]} "
            f"tokens: lower --micro-batch, or add --gradient-checkpointing (the step stays the same), and --resume"
        ) from error


def peak():
    """Largest memory in use so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
