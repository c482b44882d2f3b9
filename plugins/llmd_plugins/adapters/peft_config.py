"""adapter_config.json: what it may say, and what each module's rank and scaling follow from it.

The rules are those of PEFT (https://huggingface.co/docs/peft): alpha / rank, or alpha / sqrt(rank) with use_rslora; rank and
alpha of single modules by patterns; which modules are changed by target_modules, exclude_modules and layers_to_transform.
What could change the result and is not known here is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmd.api.v1 import AdapterError

CONFIG = "adapter_config.json"
_MAX_BYTES = 4 << 20
_MAX_PATTERN = 2048
_MAX_REPEATS = 3
_MAX_RULES = 4096
_ALL_LINEAR = "all-linear"

# keys that say nothing about how the adapter computes
_SILENT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "revision",
        "runtime_config", "task_type", "velora_config", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip
# keys that are read here
_READ = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora",
        "use_rslora",
    }
)  # fmt: skip
# the others start from a changed base, which the served one is not
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class Rule(NamedTuple):
    """A number for the modules whose names end as the pattern says."""

    pattern: re.Pattern[str]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What is needed of adapter_config.json."""

    rank: int
    alpha: float
    rank_pattern: tuple[Rule, ...]
    alpha_pattern: tuple[Rule, ...]
    use_rslora: bool
    use_dora: bool
    bias: str
    lora_bias: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank that the patterns, or the whole adapter, give a module."""
        return int(_first(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str, rank: int) -> float:
        """What B·A is multiplied by."""
        alpha = float(_first(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def wants(self, module: str, kind: str) -> bool:
        """Whether the adapter should change a module of this name; False too where the config does not tell."""
        if _matches(self.exclude_modules, module) or any(_ends(module, name) for name in self.modules_to_save):
            return False
        if kind == "merged":  # never named by who has the parts; taken as it comes
            return False
        if self.target_modules == _ALL_LINEAR:
            return kind == "linear" and re.search(r"\.\d+\.", module) is not None  # a head is no part of it
        if self.target_modules is None or not _matches(self.target_modules, module):
            return False
        return isinstance(self.target_modules, str) or self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = next((match for pattern in patterns if (match := re.match(rf".*?\.{pattern}\.(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def read_config(folder: Path) -> PeftConfig:
    """Read and check the file. Raises AdapterError that names the key, its value and what is allowed."""
    raw = _read_json(folder / CONFIG)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{CONFIG}: peft_type must be 'LORA', got {kind!r}")
    for key, value in raw.items():
        if key not in _READ and key not in _SILENT and value not in (None, False, "", [], {}):
            raise AdapterError(f"{CONFIG}: {key} is not served: it changes what the adapter computes")
    init = raw.get("init_lora_weights", True)
    if init not in _INITS:
        raise AdapterError(
            f"{CONFIG}: init_lora_weights {init!r} starts from a changed base; convert it to plain LoRA first"
        )
    return PeftConfig(
        rank=_number(raw, "r", 8, int),
        alpha=_number(raw, "lora_alpha", 8, float),
        rank_pattern=_rules(raw, "rank_pattern", int),
        alpha_pattern=_rules(raw, "alpha_pattern", float),
        use_rslora=_switch(raw, "use_rslora"),
        use_dora=_switch(raw, "use_dora"),
        bias=_bias(raw),
        lora_bias=_switch(raw, "lora_bias"),
        target_modules=_names(raw, "target_modules"),
        exclude_modules=_names(raw, "exclude_modules") or (),
        modules_to_save=_list(raw, "modules_to_save", str),
        layers_to_transform=_list(raw, "layers_to_transform", int),
        layers_pattern=tuple(map(_checked_pattern, _list(raw, "layers_pattern", str))),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AdapterError(f"{CONFIG} has more than {_MAX_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{CONFIG} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} cannot be read: {type(error).__name__}") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{CONFIG} must be an object, got {type(raw).__name__}")
    return raw


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool) and 0 < value < 1 << 20


def _number(raw: Mapping[str, Any], key: str, default: float, kind: type) -> Any:
    value = raw.get(key, default)
    if not _is_number(value, kind):
        raise AdapterError(f"{CONFIG}: {key} must be {'an integer' if kind is int else 'a number'} above 0, got {value!r}")
    return kind(value)


def _rules(raw: Mapping[str, Any], key: str, kind: type) -> tuple[Rule, ...]:
    value = raw.get(key) or {}
    if not isinstance(value, dict) or not all(_is_number(number, kind) for number in value.values()):
        raise AdapterError(f"{CONFIG}: {key} must give a number above 0 for each module, got {_shown(value)}")
    if len(value) > _MAX_RULES:
        raise AdapterError(f"{CONFIG}: {key} has {len(value)} entries; allowed are {_MAX_RULES}")
    return tuple(Rule(re.compile(rf"(?:.*\.)?(?:{_checked_pattern(name)})"), number) for name, number in value.items())


def _switch(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{CONFIG}: {key} must be true or false, got {_shown(value)}")
    return value


def _bias(raw: Mapping[str, Any]) -> str:
    value = raw.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        raise AdapterError(f"{CONFIG}: bias must be 'none', 'all' or 'lora_only', got {_shown(value)}")
    return str(value)


def _names(raw: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    value = raw.get(key)
    if isinstance(value, str) and value:
        return value if value == _ALL_LINEAR else _checked_pattern(value)
    return _list(raw, key, str) or None


def _list(raw: Mapping[str, Any], key: str, kind: type) -> tuple[Any, ...]:
    value = raw.get(key)
    value = [] if value is None else [value] if isinstance(value, str | int) else value
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise AdapterError(f"{CONFIG}: {key} must be a list of {kind.__name__}, got {_shown(value)}")
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- patterns


def _checked_pattern(pattern: str) -> str:
    """A regular expression that cannot take exponential time: nothing repeated that itself repeats."""
    if (
        len(pattern) > _MAX_PATTERN
        or re.search(r"[*+?}\)][*+{]", pattern)
        or len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS
    ):
        raise AdapterError(f"{CONFIG}: the pattern {_shown(pattern)} is too long or repeats what repeats")
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{CONFIG}: the pattern {_shown(pattern)} is no regular expression: {error}") from None
    return pattern


def _first(rules: Sequence[Rule], module: str, default: float) -> float:
    return next((rule.value for rule in rules if rule.pattern.fullmatch(module)), default)


def _matches(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends(module, name) for name in names)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
