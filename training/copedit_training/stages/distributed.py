"""The processes that `torchrun` starts, and what they tell each other; a process by itself passes through unchanged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError

# One process prepares images or writes the model while the others wait. A dead one is torchrun's to notice, at once.
PATIENCE = timedelta(days=1)


def rank() -> int:
    """Which of the processes this is; only process 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name: str) -> torch.device:
    """The device of this process: `choose_device`, and under torchrun the GPU of its number on this machine.

    Raises CopeditError as `choose_device` does, and for cuda:N where there are several processes.
    """
    if world() == 1:
        return choose_device(name)
    if name.startswith("cuda:"):
        raise CopeditError(f"device = {name!r}: each process of torchrun takes a GPU of its own; use auto, cuda or cpu")
    device = choose_device(name)
    return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if device.type == "cuda" else device


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, if it did: by nccl where they have GPUs, otherwise by gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    if cuda:
        torch.cuda.set_device(own_device(device))
    try:
        yield
    except (CopeditError, SystemExit):
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after other errors, when it may wait for what never comes


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Process 0 runs the body before the others do, so that they find the files that it leaves."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


def wait() -> None:
    """Until all are here."""
    if world() > 1:
        dist.barrier()


def gather(x: Tensor) -> Tensor:
    """x [N, ...] of all processes, one after the other [world * N, ...]; a constant to autograd."""
    x = x.detach()
    if world() == 1:
        return x
    x = x.contiguous()
    every = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(every, x)
    return torch.cat(every)


@torch.no_grad()
def broadcast(*tensors: Tensor) -> None:
    """What process 0 has, to all; in place."""
    if world() > 1:
        for x in tensors:
            dist.broadcast(x, 0)


def total(x: Tensor) -> Tensor:
    """The sum over all processes; in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def every_object(x: object) -> list[object]:
    """x of each process."""
    found: list[object] = [x] * world()
    if world() > 1:
        dist.all_gather_object(found, x)
    return found
