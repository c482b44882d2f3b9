"""Prints whether the Triton kernel in the interpreter copies what torch does, by case."""

import json

import torch
from kernels.test_copy_blocks import CASES, chosen, made

from llmd_kernels.copy_blocks import as_words, reference
from llmd_kernels.copy_blocks import triton as kernels

found = {}
for name, (shape, dtype, count) in CASES.items():
    sources, targets = chosen(shape[0], count)
    expected, actual = made(shape, dtype), made(shape, dtype)
    reference.copy_blocks(as_words(expected), sources, targets)
    if count:
        kernels.copy_blocks(as_words(actual), sources, targets)
    found[name] = torch.equal(as_words(actual), as_words(expected))
print(json.dumps(found))
