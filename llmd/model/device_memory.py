"""What a GPU's memory holds now, and what it held at the peak of some work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmd.errors import ModelError
from llmd.model.memory_room import show
from llmd.model.out_of_memory import is_out_of_memory

log = logging.getLogger("llmd.model")


class DeviceMemory(NamedTuple):
    """A reading. All of the device's bytes are free, held by this process's torch, or outside of it."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int  # by torch's allocator of this process
    allocated_bytes: int  # of those in tensors

    @property
    def outside_bytes(self) -> int:
        """Other processes', and what drivers and libraries of this one took: context, kernels, workspaces, graphs."""
        return max(0, self.total_bytes - self.free_bytes - self.reserved_bytes)

    @property
    def reachable_bytes(self) -> int:
        """What torch could hold in this process: what it holds, and what is free."""
        return self.free_bytes + self.reserved_bytes


class Peak(NamedTuple):
    """What was taken of a GPU at the peak of some work: by all models of this process."""

    allocated_bytes: int  # in tensors
    reserved_bytes: int  # by the allocator for them: the difference is lost in fragments
    after: DeviceMemory  # with the work done, and its memory given back


def device_memory(device: torch.device) -> DeviceMemory:
    """Read it now."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))


def peak_bytes(device: torch.device, work: Callable[[], None]) -> Peak:
    """Do some work on a GPU and see what it takes. Raises ModelError where that is more than there is."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
        torch.cuda.synchronize(device)
    except Exception as error:  # only lack of memory is another's affair
        if not is_out_of_memory(error):
            raise
        raise ModelError(_too_large(device_memory(device))) from error
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    give_back(device)
    return Peak(allocated, max(allocated, reserved), device_memory(device))


def give_back(device: torch.device) -> None:
    """Let neighbours have what torch's allocator holds beside tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _too_large(now: DeviceMemory) -> str:
    return (
        f"the largest step finds no memory beside the weights: {show(now.free_bytes)} of {show(now.total_bytes)} are free, "
        f"torch holds {show(now.reserved_bytes)}; lower scheduler.max_num_batched_tokens and scheduler.max_num_seqs, "
        "take weights of fewer bits, or give the model more of the device"
    )
