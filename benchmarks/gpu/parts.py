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
    quick: bool  # kept by --quick


PARTS = (
    Part("ceilings", "ceilings", "", 40, 5, True),
    Part("tests", "device_tests", "", 150, 30, False),
    Part("kernels", "kernels", "qwen2.5-7b", 100, 15, True),
    Part("decode qwen2.5-0.5b", "decode", "qwen2.5-0.5b", 70, 20, True),
    Part("decode qwen2.5-7b", "decode", "qwen2.5-7b", 90, 30, False),
    Part("serve qwen2.5-0.5b", "serve", "qwen2.5-0.5b", 90, 20, True),
    Part("decode llama-3-8b", "decode", "llama-3-8b", 90, 30, False),
    Part("trace qwen2.5-0.5b", "trace", "qwen2.5-0.5b", 60, 20, False),
)
