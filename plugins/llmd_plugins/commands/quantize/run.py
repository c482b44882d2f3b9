"""Layer by layer: load, see what its inputs are, round, write, and hand on what the rounded layer makes of the samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import ModelError, model_folder
from llmd_plugins.commands.quantize.awq import best_scale, fold, pairs_of
from llmd_plugins.commands.quantize.gptq import Rounded, gptq
from llmd_plugins.commands.quantize.packing import (
    awq_config,
    awq_tensors,
    compressed_config,
    fp8_tensors,
    gptq_config,
    gptq_tensors,
    int8_tensors,
)
from llmd_plugins.commands.quantize.rounding import round_to_nearest
from llmd_plugins.commands.quantize.samples import read_samples
from llmd_plugins.commands.quantize.source import Source
from llmd_plugins.commands.quantize.writer import Writer

_GROUP_SIZES = (32, 64, 128, -1)
_TOKENS_AT_ONCE = 4096
_SHARED = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}
_LINEARS = {*_SHARED, *_SHARED.values(), "self_attn.o_proj", "mlp.down_proj"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command's options say."""

    method: str
    bits: int = 4
    group_size: int = 128
    data: Path | None = None
    num_samples: int = 128
    sample_length: int = 512
    desc_act: bool = False
    damp: float = 0.05
    max_shard_bytes: int = 1 << 30
    device: str = "auto"


def run(model: str, output: Path, settings: Settings, report: Callable[[str], None]) -> str:
    """Quantize and write; a line that sums up. Raises ModelError."""
    _check(settings)
    folder = model_folder(model)
    source = Source(folder, _device(settings.device))
    _check_shapes(source, settings)
    writer = Writer(output.absolute(), settings.max_shard_bytes)
    writer.start(source.num_bytes())
    try:
        with torch.inference_mode():
            _write(source, writer, settings, report)
        config = json.loads(source.config_text) | {"quantization_config": _config(settings)}
        size = writer.finish(folder, config)
    except BaseException:
        writer.abandon()
        raise
    return f"{output}: {size / 1e6:.1f} MB, of {source.num_bytes() / 1e6:.1f}"


def _check(settings: Settings) -> None:
    needs_data = settings.method in ("gptq", "awq")
    if needs_data and settings.data is None:
        raise ModelError(f"--method {settings.method} needs --data, text to calibrate on")
    if settings.method == "awq" and settings.bits != 4:
        raise ModelError(f"--bits must be 4 for awq, got {settings.bits}")
    if needs_data and settings.group_size not in _GROUP_SIZES:
        raise ModelError(f"--group-size must be one of {', '.join(map(str, _GROUP_SIZES))}, got {settings.group_size}")
    if settings.desc_act and settings.method != "gptq":
        raise ModelError(f"--desc-act is of gptq, not of {settings.method}")


def _check_shapes(source: Source, settings: Settings) -> None:
    """Refuse before the work what the formats cannot hold."""
    if settings.method not in ("gptq", "awq"):
        return
    for name, linear in source.linears().items():
        if name.split(".", 3)[3] not in _LINEARS:
            kind = type(source.module).__name__
            raise ModelError(f"{kind}: module {name} is not of Llama's kind, the only one that {settings.method} calibrates")
        group = settings.group_size if settings.group_size > 0 else linear.in_features
        if linear.in_features % group or linear.in_features % 32 or linear.out_features % 32:
            shape = [linear.out_features, linear.in_features]
            raise ModelError(
                f"tensor {name}.weight of shape {shape} does not divide into groups of {group} and words of 32 bits"
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {name}: this machine has no GPU")
    return device


def _config(settings: Settings) -> dict[str, Any]:
    if settings.method == "gptq":
        return gptq_config(settings.bits, settings.group_size, settings.desc_act, settings.damp)
    return awq_config(settings.group_size) if settings.method == "awq" else compressed_config(settings.method)


def _write(source: Source, writer: Writer, settings: Settings, report: Callable[[str], None]) -> None:
    linears = source.linears()
    if settings.method in ("int8", "fp8"):
        if settings.data is not None:
            report(f"{settings.method} scales inputs as they come: --data is not read")
        convert = int8_tensors if settings.method == "int8" else fp8_tensors
        for name in source.names:
            tensor, module = source.read(name), name.removesuffix(".weight")
            is_linear = module in linears and name.endswith(".weight")
            writer.add({f"{module}.{key}": made for key, made in convert(tensor).items()} if is_linear else {name: tensor})
        return
    assert settings.data is not None
    samples = read_samples(settings.data, source.folder, settings.num_samples, _length(source, settings))
    report(f"calibrating on {samples.shape[0]} samples of {samples.shape[1]} tokens")
    in_layers = {name for name in source.names if name.startswith("model.layers.")}
    for name in source.names:
        if name not in in_layers:
            writer.add({name: source.read(name)})
    for tensors in _layers(source, samples, settings, report):
        in_layers -= {name.replace(".qweight", ".weight") for name in tensors}
        writer.add(tensors)
    for name in sorted(in_layers):  # what no parameter of the layers is
        writer.add({name: source.read(name)})


def _length(source: Source, settings: Settings) -> int:
    """Of the samples: not beyond the context, nor beyond a window, so that all layers see all of it."""
    limits = [
        source.config.max_position_embeddings,
        getattr(source.config, "sliding_window", None) or settings.sample_length,
    ]
    return int(min(settings.sample_length, *limits))


def _layers(
    source: Source, samples: Tensor, settings: Settings, report: Callable[[str], None]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each layer."""
    hidden = source.embed(samples)
    position = source.rotary(samples.shape[1])
    for prefix, layer in source.layers():
        stats = _observe(layer, hidden, position)
        if settings.method == "awq":
            _scale(layer, stats, settings)
        made, error = {}, 0.0
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                rounded = _round(module.weight.data, stats[name].hessian, settings)
                change = rounded.values() - module.weight.data
                error += float(((change @ stats[name].hessian) * change).sum())
                module.weight.data = rounded.values()
                made[name] = rounded
        report(f"{prefix}: error {error / stats['mlp.down_proj'].num_tokens:.4g} a token")
        hidden = torch.cat([_forward(layer, part, position) for part in _parts(hidden)])
        yield _tensors(prefix, layer, made, source, settings)


class Stats:
    """What is known of a linear's inputs: the sum of their products, and of their sizes."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.hessian = torch.zeros(num_features, num_features, device=device)
        self.sizes = torch.zeros(num_features, device=device)
        self.num_tokens = 0

    def see(self, x: Tensor) -> None:
        """Add inputs [..., K]."""
        x = x.flatten(0, -2)
        self.hessian.addmm_(x.T, x)
        self.sizes += x.abs().sum(0)
        self.num_tokens += len(x)


def _observe(layer: nn.Module, hidden: Tensor, position: Any) -> dict[str, Stats]:
    """Statistics by linear; those that read the same share them."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    stats = {name: Stats(each.in_features, hidden.device) for name, each in linears.items() if name not in _SHARED}

    def watch(found: Stats) -> Callable[..., None]:
        return lambda module, inputs: found.see(inputs[0])

    hooks = [linears[name].register_forward_pre_hook(watch(found)) for name, found in stats.items()]
    try:
        for part in _parts(hidden):
            _forward(layer, part, position)
    finally:
        for hook in hooks:
            hook.remove()
    return stats | {name: stats[other] for name, other in _SHARED.items()}


def _parts(hidden: Tensor) -> tuple[Tensor, ...]:
    return hidden.split(max(1, _TOKENS_AT_ONCE // hidden.shape[1]))


def _forward(layer: nn.Module, hidden: Tensor, position: Any) -> Tensor:
    output = layer(hidden, attention_mask=None, position_embeddings=position)
    return output[0] if isinstance(output, tuple) else output


def _scale(layer: Any, stats: dict[str, Stats], settings: Settings) -> None:
    """AWQ: fold scales into the layer, and into what is known of the inputs."""
    for pair in pairs_of(layer):
        found = stats[pair.linears[0]]
        weights = [layer.get_submodule(name).weight.data for name in pair.linears]
        group = settings.group_size if settings.group_size > 0 else weights[0].shape[1]
        mean = found.sizes / found.num_tokens
        scale = best_scale(weights, found.hessian, mean, group_size=group, bits=settings.bits)
        fold(pair, layer, scale)
        found.hessian /= scale.outer(scale)
        found.sizes /= scale


def _round(weight: Tensor, hessian: Tensor, settings: Settings) -> Rounded:
    group = settings.group_size if settings.group_size > 0 else weight.shape[1]
    if settings.method == "gptq":
        try:
            return gptq(
                weight, hessian, bits=settings.bits, group_size=group, damp=settings.damp, desc_act=settings.desc_act
            )
        except ValueError as error:
            raise ModelError(str(error)) from None
    codes, grid = round_to_nearest(weight, group, settings.bits, symmetric=False)
    return Rounded(codes, torch.arange(weight.shape[1], device=weight.device) // group, grid)


def _tensors(
    prefix: str, layer: nn.Module, made: dict[str, Rounded], source: Source, settings: Settings
) -> dict[str, Tensor]:
    """A layer's tensors as they are written: codes for linears, all others in the checkpoint's own dtype."""
    pack = gptq_tensors if settings.method == "gptq" else awq_tensors
    tensors = {f"{prefix}.{name}.{key}": tensor for name, rounded in made.items() for key, tensor in pack(rounded).items()}
    for name, parameter in layer.named_parameters():
        if name.removesuffix(".weight") not in made:
            tensors[f"{prefix}.{name}"] = parameter.data.to(source.read(f"{prefix}.{name}").dtype)
    return tensors
