"""Prints the largest relative error of the Triton kernels in the interpreter, by case."""

import json

import torch
from kernels.test_lora import CASES, by_hand, made

from llmd_kernels.lora import triton as kernels

errors = {}
for name, case in CASES.items():
    weights, rows, x, y = made(*case)
    expected = by_hand(y, x, weights, case[-1])
    actual = kernels.add_lora(y.clone(), x, weights, rows)
    assert not torch.isnan(actual).any(), name
    errors[name] = float((actual.double() - expected).abs().max() / expected.abs().max())
print(json.dumps(errors))
