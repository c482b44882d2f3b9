"""Rotary position embedding with the scalings of long-context checkpoints."""

from __future__ import annotations

import math

import torch

from llmd.model.config import RopeConfig
from llmd_kernels.rotary import rotary


class Rotary:
    """Turns query and key heads in place; all layers of a model share its table of cosines and sines."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(rope, int(head_dim * rope.partial), max_position)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device="cpu"), frequencies)
        self.cos_sin = (torch.cat((angles.cos(), angles.sin()), dim=-1) * factor).to(device)  # [max_position, R]

    def __call__(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
        """Turn q [T, H, D] and k [T, K, D] in place; positions [T] int64."""
        rotary(q, k, positions, self.cos_sin)


def inverse_frequencies(rope: RopeConfig, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """[dim/2] float32 radians a position, and the factor on cosines and sines.

    `dynamic` in Hugging Face's code depends on the longest sequence of the moment, so that cached keys go stale. Here the
    longest sequence that is served decides once: within the original context it equals Hugging Face's.
    """
    if rope.kind == "yarn":
        return _yarn(rope, dim)
    theta = rope.theta
    if rope.kind == "dynamic" and max_position > rope.original_max_position:
        grown = rope.factor * max_position / rope.original_max_position - (rope.factor - 1)
        theta *= grown ** (dim / (dim - 2))
    frequencies = 1.0 / _powers(theta, dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies, 1.0


def _powers(theta: float, dim: int) -> torch.Tensor:
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """As llama3, with a ramp over the dims; cosines and sines are scaled to keep the scores' temperature."""

    def dim_of(rotations: float) -> float:
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    powers = _powers(rope.theta, dim)
    return (1 - keep) / (rope.factor * powers) + keep / powers, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
