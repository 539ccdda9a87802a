"""Processes: torchrun starts one for each GPU, and they share the work of a step.

Everything works in a plain `python train.py` as well: one process, rank 0. Collective: every rank must call it, in the
same order.
"""

from collections.abc import Iterable
from datetime import timedelta
import os
import socket
import sys
from typing import TypeVar

import torch
import torch.distributed as dist

from support.cli import RunError, process_rank

PATIENCE = timedelta(hours=1)  # while rank 0 writes a checkpoint the others wait
Value = TypeVar("Value")


def start() -> None:
    """Join the other processes that torchrun started, one for each GPU; nothing to do without torchrun.

    Rank 0 alone prints: the standard output of the others is closed. Raises RunError where torchrun has ended already.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun answers there: not for PATIENCE if it died
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
        except OSError as error:
            raise RunError(f"torchrun does not answer ({error.strerror or error}): it has ended") from error
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    total(0)  # until all have come: one that ends at once, with a user's mistake, would break the others' start
    if process_rank():
        sys.stdout = open(os.devnull, "w")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values: float) -> list[float]:
    """Sums over all processes, a list of floats; collective."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of ranks; collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients over all processes, in one message; collective."""
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    together = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(together)
    for parameter, summed in zip(parameters, together.split([parameter.numel() for parameter in parameters])):
        parameter.grad.copy_(summed.view_as(parameter))
