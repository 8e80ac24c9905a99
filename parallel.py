"""Training by several processes, one for each GPU, as torchrun starts them; a plain start is a group of one.

Apart from networks.py, because only the stages that train know of processes: what they train does not.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from common import InputError
from networks import pick_device

T = TypeVar("T")


class Group:
    """This process among those that train one network.

    Parameters
    ----------
    device : str
        As the config has it; with several processes auto and cuda are the GPU of torchrun's local rank.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and of all.
    device : torch.device
        Where this process trains.

    Raises
    ------
    InputError
        If this machine has no such device.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if self.size > 1 and device.startswith("cuda:") and device != f"cuda:{os.environ['LOCAL_RANK']}":
            raise InputError(f"device: found {device!r} for {self.size} processes, expected cuda: a GPU for each")
        self.device = pick_device(device)
        if self.size > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process' share of `count` items: whole and in order; of few items it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network with gradients that are means over the processes."""
        if self.size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def agreed(self, value: T) -> T:
        """The first process' value, so that all go the same way."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def close(self) -> None:
        """End the group, all processes together."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()
