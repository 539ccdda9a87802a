"""Sharing a model among processes: whole in each of them (DDP), or cut into pieces (FSDP2)."""

from contextlib import nullcontext

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from support import processes


def distribute(model, layers, shard):
    """What the loop calls in the model's place: the model itself, or PyTorch's wrapper for several processes.

    layers: modules that are cut on their own where `shard` asks for it.
    """
    if shard:
        cut(model, layers)
    elif processes.count() > 1:
        return DistributedDataParallel(model)
    return model


def cut(model, layers):
    """Spread weights, gradients and optimiser state of what trains over all processes (FSDP2); collective.

    A layer's weights come together only while it computes. What is frozen stays whole in each process.
    """
    mesh = init_device_mesh(model.device.type, (processes.count(),))
    half = torch.bfloat16 if model.device.type == "cuda" else None
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)}
    for layer in layers:
        fully_shard(layer, **how)
    fully_shard(model, **how, ignored_params={p for p in model.parameters() if not p.requires_grad})


def synchronised(model, last):
    """Gradients go between processes once a step, with its last micro-batch.

    Not where the model is cut: to keep the whole gradient until then, each process would need room for all of it.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
