"""Compiles the Triton kernels ahead of time, by what their wrapper launches; prints by target what is wrong with them."""

import json

import torch
from kernels.compiling import TARGETS, launches, unfit

from llmd_kernels.lora import LoraRows, LoraWeights
from llmd_kernels.lora import triton as kernels

SLOTS, DEPTH, WIDTH = 4, 3584, 4608


def call(rows, rank):
    a, b = torch.empty(SLOTS, 3, rank, DEPTH).bfloat16(), torch.empty(SLOTS, rank, WIDTH).bfloat16()
    weights = LoraWeights(a, b, torch.zeros(SLOTS, 3, dtype=torch.int32), (0, 3584, 4096, WIDTH))
    slots = LoraRows(torch.zeros(rows, dtype=torch.int32), torch.zeros(SLOTS + 1, dtype=torch.int32), ())
    x, y = torch.empty(rows, DEPTH).bfloat16(), torch.empty(rows, WIDTH).bfloat16()
    kernels.add_lora(y, x, weights, slots)


def compiled(target, shared):
    found = {}
    for rows, rank in ((1, 16), (64, 64), (4096, 64)):
        with launches(target) as made:
            call(rows, rank)
        found |= {f"{launch.name}, {rows} rows of rank {rank}": unfit(launch.built, target, shared) for launch in made}
    return found


print(json.dumps({name: compiled(*target) for name, target in TARGETS.items()}))
