"""Prints, by target and width of a word, what is wrong with the kernel compiled ahead of time, and how wide it loads."""

import json
import re

import triton
from kernels.compiling import TARGETS, trouble
from triton.compiler import ASTSource

from llmd_kernels.copy_blocks.triton import BLOCK, copy_words

SIZES = {"bf16, 24 layers": ("i64", 24 * 512), "odd": ("i16", 3 * 1037), "bytes": ("i8", 999)}


def widest(word, size, target):
    """Bits that one load of the pool moves."""
    types = {"pool": f"*{word}", "sources": "*i64", "targets": "*i64", "WORDS": "constexpr", "BLOCK": "constexpr"}
    values = {(3,): size, (4,): BLOCK}
    source = ASTSource(fn=copy_words, signature=types, constexprs=values, attrs={(0,): [["tt.divisibility", 16]]})
    text = triton.compile(source, target=target).asm["ptx"]
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", text)
    return max(int(count or 1) * int(bits) for count, bits in loads)


found = {}
for device, (target, shared) in TARGETS.items():
    for name, (word, size) in SIZES.items():
        constants = {"WORDS": size, "BLOCK": BLOCK}
        types = {"pool": f"*{word}", "sources": "*i64", "targets": "*i64"}
        found[f"{device} {name}"] = trouble(copy_words, types, constants, {}, target, shared)
widths = {device: widest("i64", 24 * 512, TARGETS[device][0]) for device in ("sm_80", "sm_90")}
print(json.dumps({"trouble": found, "widths": widths}))
