"""modules.json of sentence-transformers: what comes behind the transformer, for the layers of text and of tensors alike.

modules.json                Transformer → Pooling → Dense … → Normalize; anything else is refused by name
<n>_Pooling/config.json     which hidden states are pooled
<n>_Dense/config.json       a linear layer and its activation, weights beside it in model.safetensors

https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmd.errors import ModelError

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_MODE_NAMES = {**{name: name for name in _MODES.values()}, "lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_ONLY_DENSE_MAY_REPEAT = "Dense"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_MAX_FEATURES = 1 << 20


@dataclass(frozen=True, slots=True)
class DenseModule:
    """activation(weight · x + bias) over pooled vectors; `path` is its folder, relative to the model's."""

    path: str
    in_features: int
    out_features: int
    has_bias: bool
    activation: str  # one of ACTIVATIONS


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """What modules.json lists; None and empty where there is none."""

    pooling: str | None = None  # "cls", "mean", "max", "last", "mean_sqrt_len" or "weightedmean"
    includes_prompt: bool = True
    dense: tuple[DenseModule, ...] = ()
    normalizes: bool = True


def read_modules(folder: Path) -> SentenceModules:
    """Read a model's folder. Raises ModelError for modules, orders and poolings that are not served."""
    modules = _listed(folder)
    if not modules:
        return SentenceModules()
    pooling, includes_prompt = None, True
    for kind, path in modules:
        if kind == "Pooling":
            pooling, includes_prompt = _read_mode(folder, path)
    dense = tuple(_read_dense(folder, path) for kind, path in modules if kind == "Dense")
    for one, following in pairwise(dense):
        if one.out_features != following.in_features:
            raise ModelError(
                f"{folder.name}/{following.path}/config.json: in_features must be {one.out_features}, the out_features "
                f"of {one.path}, got {following.in_features}"
            )
    return SentenceModules(pooling, includes_prompt, dense, any(kind == "Normalize" for kind, _ in modules))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent.name}/{path.name} must be a JSON object, not a {type(value).__name__}")
    return value


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order; none where the file is missing."""
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder.name}/modules.json cannot be read ({error}): download it again") from error
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise ModelError(f"{folder.name}/modules.json must be a list of objects")
    modules = [(str(item.get("type", "")).rpartition(".")[2], str(item.get("path", ""))) for item in listed]
    for kind, path in modules:
        if kind not in _ORDER:
            raise ModelError(
                f"{folder.name}/modules.json: the module {kind!r} ({path or 'no path'}) is not served; "
                f"served are {', '.join(_ORDER)}"
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ModelError(f"{folder.name}/modules.json: path {path!r} must lie within the model's folder")
    _check_order(folder, [kind for kind, _ in modules])
    return modules


def _check_order(folder: Path, kinds: list[str]) -> None:
    places = [_ORDER.index(kind) for kind in kinds]
    twice = {kind for kind in kinds if kinds.count(kind) > 1 and kind != _ONLY_DENSE_MAY_REPEAT}
    if places != sorted(places) or twice or ("Dense" in kinds and "Pooling" not in kinds):
        raise ModelError(
            f"{folder.name}/modules.json: the order {' → '.join(kinds)} is not served; "
            "served is Transformer → Pooling → Dense … → Normalize"
        )


def _read_mode(folder: Path, path: str) -> tuple[str, bool]:
    """The pooling, and whether the prompt's tokens are part of it."""
    config = read_object(folder / path / "config.json")
    modes = _modes(config)
    if len(modes) != 1 or modes[0] not in _MODE_NAMES:
        served = ", ".join(sorted(set(_MODE_NAMES.values())))
        found = " and ".join(modes) or "none"
        raise ModelError(f"{folder.name}/{path}/config.json: pooling must be one of {served}, got {found}")
    return _MODE_NAMES[modes[0]], config.get("include_prompt", True) is not False


def _modes(config: Mapping[str, Any]) -> list[str]:
    """One name for each mode that is switched on."""
    named = config.get("pooling_mode")
    if isinstance(named, str):
        return [named]
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    return [_MODES.get(key, key.removeprefix("pooling_mode_")) for key in on] or (["mean"] if not config else [])


def _read_dense(folder: Path, path: str) -> DenseModule:
    where = f"{folder.name}/{path}/config.json"
    config = read_object(folder / path / "config.json")
    sizes = {}
    for key in ("in_features", "out_features"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_FEATURES:
            raise ModelError(f"{where}: {key} must be an integer between 1 and {_MAX_FEATURES}, got {value!r}")
        sizes[key] = value
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelError(f"{where}: {key} must be 'sentence_embedding', no other is served, got {config[key]!r}")
    bias = config.get("bias", True)
    if not isinstance(bias, bool):
        raise ModelError(f"{where}: bias must be true or false, got {bias!r}")
    named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = "Identity" if named is None else str(named).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise ModelError(f"{where}: activation_function must be one of {', '.join(ACTIVATIONS)}, got {named!r}")
    return DenseModule(path, sizes["in_features"], sizes["out_features"], bias, activation)
