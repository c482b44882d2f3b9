"""What is measured, in the order of its worth: the later ones are dropped where time runs out."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Cases that share a process, as long as none of them breaks it."""

    name: str
    module: str  # of this folder; its `cases(setting)` gives them by name
    model: str  # of shapes.MODELS, where there is one
    limit_s: float  # no longer than this
    least_s: float  # not worth beginning with less
    case_s: float  # a case that takes longer hangs
    quick: bool  # kept by --quick


PARTS = (  # a case's time has room for compiling: many kernels are compiled by whoever is first to want them
    Part("ceilings", "ceilings", "", 40, 5, 30, True),
    Part("tests", "device_tests", "", 125, 20, 115, False),
    Part("small", "small", "qwen2.5-0.5b", 90, 15, 60, True),
    Part("kernels", "kernels", "qwen2.5-7b", 100, 15, 60, True),
    Part("decode qwen2.5-0.5b", "decode", "qwen2.5-0.5b", 70, 15, 60, True),
    Part("decode qwen2.5-7b", "decode", "qwen2.5-7b", 90, 20, 60, False),
    Part("serve qwen2.5-0.5b", "serve", "qwen2.5-0.5b", 65, 20, 60, True),
    Part("loop qwen2.5-0.5b", "loop", "qwen2.5-0.5b", 80, 20, 60, True),
    Part("start qwen2.5-0.5b", "start", "qwen2.5-0.5b", 95, 15, 75, True),
    Part("trace qwen2.5-0.5b", "trace", "qwen2.5-0.5b", 40, 15, 35, False),
    Part("decode llama-3-8b", "decode", "llama-3-8b", 90, 20, 60, False),
    Part("start qwen2.5-7b", "start", "qwen2.5-7b", 60, 15, 50, False),
)
