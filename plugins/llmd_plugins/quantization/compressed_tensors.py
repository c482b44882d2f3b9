"""Checkpoints of llm-compressor: groups of modules, each with a scheme for its weights and, maybe, its inputs.

Format: https://github.com/vllm-project/compressed-tensors, QuantizationConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ModelError, QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, matches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization

_KINDS = ("compressed-tensors", "compressed_tensors")
_LINEARS = ("Linear", "LinearBase", "ColumnParallelLinear", "RowParallelLinear", "ParallelLMHead")
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized",
)  # fmt: skip
_MIXED = "mixed-precision"


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of one group of modules are stored."""

    format: str
    type: str  # "int" or "float"
    bits: int
    strategy: str  # which weights share a scale: tensor, channel, group, tensor_group, block
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    act_order: bool  # groups are of input features in an order of their own
    input_bits: int | None  # None: inputs are as they are


class CompressedConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        form = settings.choice("format", allowed=(*_FORMATS, _MIXED), default="pack-quantized")
        sparsity = settings.table("sparsity_config")
        if sparsity.choice("format", allowed=("dense", *_sparse(sparsity)), default="dense") != "dense":
            raise ModelError(f"{sparsity.path}.format is {sparsity.raw['format']!r}: sparse weights are not read")
        settings.refuse("transform_config", "rotations of activations are not served")
        groups = settings.table("config_groups")
        self._schemes: list[tuple[tuple[str, ...], WeightScheme]] = []
        for name in groups.raw:
            group = groups.table(name)
            group.refuse("output_activations", "quantized outputs are not served")
            if group.raw.get("weights") is not None:
                self._schemes.append((group.names("targets"), _scheme(group, form)))
        if not self._schemes:
            raise settings.wrong("config_groups", raw.get("config_groups"), "an object of groups with weights")
        self._ignored = settings.names("ignore")

    def scheme(self, name: str) -> WeightScheme | None:
        """How a module is stored; None: as it was. Its name decides before a regex, and that before its class."""
        if any(_is_named(name, target) for target in self._ignored):
            return None
        for rank in (_is_exactly, _is_by_regex, _is_by_class):
            for targets, scheme in self._schemes:
                if any(rank(name, target) for target in targets):
                    return scheme
        return None


def _is_exactly(name: str, target: str) -> bool:
    return name == target


def _is_by_regex(name: str, target: str) -> bool:
    return target.startswith("re:") and matches(target[3:], name)


def _is_by_class(name: str, target: str) -> bool:
    return target in _LINEARS


def _is_named(name: str, target: str) -> bool:
    return _is_exactly(name, target) or _is_by_regex(name, target)


def _sparse(settings: Settings) -> tuple[str, ...]:
    """Whatever format is named: it is refused with a better word than the list of those that are."""
    form = settings.raw.get("format")
    return (form.lower(),) if isinstance(form, str) else ()


def _scheme(group: Settings, default_format: str) -> WeightScheme:
    weights, inputs = group.table("weights"), group.table("input_activations")
    form = group.choice("format", allowed=_FORMATS, default=default_format)
    kind = weights.choice("type", allowed=("int", "float"), default="int")
    size = weights.group_size("group_size")
    strategy = weights.choice(
        "strategy", allowed=("tensor", "channel", "group", "tensor_group", "block"), default="group" if size else "channel"
    )
    if strategy in ("group", "tensor_group") and size is None:
        raise weights.wrong("group_size", None, "a whole number above 0")
    order = weights.raw.get("actorder")
    scheme = WeightScheme(
        format=form, type=kind, bits=weights.integer("num_bits", default=8), strategy=strategy,
        group_size=size if strategy in ("group", "tensor_group") else None,
        block=_block(weights) if strategy == "block" else None, symmetric=weights.flag("symmetric", default=True),
        act_order=order is True or str(order).lower() in ("group", "dynamic"),
        input_bits=inputs.integer("num_bits", default=8) if inputs.raw else None,
    )  # fmt: skip
    _check(weights, scheme)
    return scheme


def _block(weights: Settings) -> tuple[int, int]:
    value = weights.raw.get("block_structure")
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) for size in sizes or ())
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise weights.wrong("block_structure", value, "two whole numbers above 0")
    return rows, columns


def _check(weights: Settings, scheme: WeightScheme) -> None:
    """Refuse by name what the format's own tool would not write, or what is not read here."""
    is_four = scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
    if scheme.type == "float" and scheme.bits != (4 if is_four else 8):
        raise weights.wrong("num_bits", scheme.bits, f"{4 if is_four else 8} for floats in {scheme.format}")
    if scheme.type == "int" and not 2 <= scheme.bits <= 8:
        raise weights.wrong("num_bits", scheme.bits, "from 2 to 8")
    fits = {"pack-quantized": "int", "int-quantized": "int", "float-quantized": "float"}
    if fits.get(scheme.format, "float" if is_four else scheme.type) != scheme.type:
        raise weights.wrong("type", scheme.type, f"one that format {scheme.format} holds")
    if scheme.type == "float" and not scheme.symmetric:
        raise weights.wrong("symmetric", False, "true for floats")
    if scheme.strategy == "block" and scheme.type == "int":
        raise weights.wrong("strategy", "block", "tensor, channel or group for integers")
    if scheme.type == "float" and not is_four and scheme.strategy in ("group", "tensor_group"):
        raise weights.wrong("strategy", scheme.strategy, "tensor, channel or block for 8-bit floats")
    if is_four and scheme.group_size != (32 if scheme.format.startswith("mx") else 16):
        raise weights.wrong("group_size", scheme.group_size, "32 for MXFP4, 16 for NVFP4")
    if scheme.act_order and scheme.strategy != "group":
        raise weights.wrong("actorder", weights.raw.get("actorder"), "null without groups")


def is_compressed(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind not in _KINDS:
        return False
    CompressedConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.compressed_linear import Compressed

    return Compressed(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "compressed-tensors: packed and plain integers, 8- and 4-bit floats"
    return [QuantizationSpec(name="compressed-tensors", summary=summary, build=_build, check=is_compressed)]
