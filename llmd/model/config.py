"""config.json, read once into one frozen type: each family's spelling of a fact ends here. Loads no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmd.errors import ModelError
from llmd.model.architectures import architecture_names
from llmd.model.classifier_tokens import ClassifierTokens, read_classifier_tokens

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_SIZE = 1 << 31
_QUANTIZER_FILE = "hf_quant_config.json"
_LABEL_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
_PROBLEM_ACTIVATIONS = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn the query and key heads; `kind` is one of ROPE_KINDS."""

    kind: str = "default"
    theta: float = 10000.0
    partial: float = 1.0  # share of the head that is turned
    factor: float = 1.0
    original_max_position: int = 0  # context length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConfig:
    """The facts of config.json that a decoder is built from; `raw` keeps the file for an architecture's own keys."""

    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: RopeConfig = RopeConfig()
    windows: tuple[int | None, ...] = ()  # each layer's sliding window in tokens; None: all of the context
    soft_cap: float | None = None  # attention scores s become soft_cap · tanh(s / soft_cap)
    has_sinks: bool = False  # a score more in each head's softmax, of nothing
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None  # "float32" | "float16" | "bfloat16" | None: not said
    quantization: Mapping[str, Any] | None = None  # quantization_config as it stands
    classifier_tokens: ClassifierTokens | None = None  # scores are logits of these
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens, that the positions were made for, rope scaling included."""
        if self.rope.kind == "linear":
            return int(self.max_position * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(int(self.rope.original_max_position * self.rope.factor), self.max_position)
        return self.max_position

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels, in the order of its scores."""
        if self.classifier_tokens is not None:
            return self.classifier_tokens.labels
        named = self.raw.get("id2label")
        if isinstance(named, Mapping) and named:
            return tuple(str(named[key]) for key in sorted(named, key=_label_index))
        count = _Keys(self.raw).integer("num_labels", 2)
        return tuple(f"LABEL_{index}" for index in range(count))

    @property
    def label_activation(self) -> str:
        """What turns a classifier's scores into what it was trained for: "sigmoid", "softmax" or "none"."""
        sentences = self.raw.get("sentence_transformers")
        named = sentences.get("activation_fn") if isinstance(sentences, Mapping) else None
        named = named or self.raw.get("sbert_ce_default_activation_function")
        if named is not None:
            kind = str(named).rpartition(".")[2]
            if kind not in _LABEL_ACTIVATIONS:
                known = ", ".join(_LABEL_ACTIVATIONS)
                raise ModelError(f"config.json: a cross-encoder's activation_fn must be one of {known}, got {named!r}")
            return _LABEL_ACTIVATIONS[kind]
        problem = self.raw.get("problem_type")
        if problem in _PROBLEM_ACTIVATIONS:
            return _PROBLEM_ACTIVATIONS[problem]
        return "sigmoid" if len(self.labels) == 1 else "softmax"

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer."""
        return min((window for window in self.windows if window is not None), default=None)


def read_config(
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    spell: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> ArchitectureConfig:
    """Read and check `folder`/config.json, `overrides` over it; ModelError names the key that is missing or wrong.

    `spell` turns the content into the words that are read here, where an architecture has words of its own.
    """
    raw = read_raw_config(folder, overrides)
    config = parse_config(raw if spell is None else spell(raw))
    return replace(config, raw=raw, classifier_tokens=read_classifier_tokens(raw, folder))


def read_raw_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`folder`/config.json as it stands, `overrides` over it; what a quantizer wrote into a file of its own is added."""
    raw = _read_object(folder, "config.json")
    if "quantization_config" not in raw and (folder / _QUANTIZER_FILE).is_file():
        given = _read_object(folder, _QUANTIZER_FILE)
        producer, settings = given.get("producer"), given.get("quantization")
        if not isinstance(producer, dict) or not isinstance(settings, dict):
            raise ModelError(f"{folder.name}: {_QUANTIZER_FILE} must have the objects 'producer' and 'quantization'")
        raw["quantization_config"] = {"quant_method": producer.get("name"), **settings}
    return {**raw, **(overrides or {})}


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder.name}: {name} is missing") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{folder.name}: {name} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{folder.name}: {name} must be an object, not {type(raw).__name__}")
    return raw


def parse_config(raw: Mapping[str, Any]) -> ArchitectureConfig:
    """Turn config.json's content into an ArchitectureConfig."""
    given, spell = raw, _SPELLINGS.get(str(raw.get("model_type")))
    raw = spell(raw) if spell is not None else raw
    keys = _Keys(raw)
    num_heads = keys.integer("num_attention_heads")
    num_kv_heads = keys.integer("num_key_value_heads", num_heads)
    hidden_size = keys.integer("hidden_size")
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
    head_dim = keys.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim must be even, got {head_dim}")
    num_layers = keys.integer("num_hidden_layers")
    max_position = keys.integer("max_position_embeddings")
    return ArchitectureConfig(
        architectures=architecture_names(raw),
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        max_position=max_position,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        hidden_act=str(raw.get("hidden_act", "silu")),
        rope=_rope(raw, max_position),
        windows=_windows(raw, keys, num_layers),
        soft_cap=keys.number("attn_logit_softcapping", 0.0) or None,
        has_sinks=keys.boolean("has_attention_sinks", False),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
        bos_token_id=keys.token_ids("bos_token_id")[0] if raw.get("bos_token_id") is not None else None,
        eos_token_ids=keys.token_ids("eos_token_id"),
        dtype=_dtype(raw),
        quantization=_table(raw, "quantization_config"),
        raw=given,
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed reads of config.json whose errors name the key."""

    raw: Mapping[str, Any]

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json: {key} is missing")
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            raise ModelError(f"config.json: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ModelError(f"config.json: {key} must be a number of at least 0, got {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise ModelError(f"config.json: {key} must be a token id or a list of them, got {value!r}")
        return tuple(ids)


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ModelError(f"config.json: {key} must be an object, got {value!r}")
    return value


def _dtype(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5 writes `dtype`
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"config.json: dtype must be one of {', '.join(_DTYPES)}, got {value!r}")
    return name


def _windows(raw: Mapping[str, Any], keys: _Keys, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window: layer_types says so, else max_window_layers, else all layers alike (Mistral)."""
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != num_layers):
        raise ModelError(f"config.json: layer_types must be a list of num_hidden_layers ({num_layers}) entries")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: layer_types may hold 'full_attention' and 'sliding_attention', got {kind!r}")
    if raw.get("sliding_window") is None or raw.get("use_sliding_window") is False:
        if kinds and "sliding_attention" in kinds:
            raise ModelError("config.json: layer_types asks for sliding_attention, but sliding_window is not set")
        return (None,) * num_layers
    window = keys.integer("sliding_window")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if "use_sliding_window" in raw:
        first = raw.get("max_window_layers", 28)
        return tuple(window if index >= first else None for index in range(num_layers))
    return (window,) * num_layers


def _rope(raw: Mapping[str, Any], max_position: int) -> RopeConfig:
    """From transformers 5's rope_parameters, or the older rope_theta and rope_scaling."""
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    table = dict(_table(raw, key) or {})
    if nested := [name for name in table if isinstance(table[name], Mapping)]:
        raise ModelError(f"config.json: {key} by layer type ({', '.join(nested)}) is not supported")
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if raw.get(name) is not None:
            table.setdefault(name, raw[name])
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ModelError(f"config.json: {key}.rope_type must be one of {', '.join(ROPE_KINDS)}, got {kind!r}")
    keys = _Keys(table)
    original = keys.integer("original_max_position_embeddings", max_position)
    if kind == "yarn" and table.get("factor") is None:
        table["factor"] = max_position / original
    elif kind != "default" and table.get("factor") is None:
        raise ModelError(f"config.json: {key}.factor is missing (rope_type {kind!r})")

    def optional(name: str) -> float | None:
        return keys.number(name, 0.0) if table.get(name) is not None else None

    rope = RopeConfig(
        kind=kind,
        theta=keys.number("rope_theta", 10000.0),
        partial=keys.number("partial_rotary_factor", 1.0),
        factor=keys.number("factor", 1.0),
        original_max_position=original,
        low_freq_factor=keys.number("low_freq_factor", 1.0),
        high_freq_factor=keys.number("high_freq_factor", 4.0),
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=keys.boolean("truncate", True),
    )
    _check_rope(rope, key)
    return rope


def _check_rope(rope: RopeConfig, key: str) -> None:
    if rope.factor <= 0 or rope.theta <= 1:
        raise ModelError(
            f"config.json: {key} needs factor > 0 and rope_theta > 1, got factor {rope.factor} and theta {rope.theta}"
        )
    if not 0 < rope.partial <= 1:
        raise ModelError(f"config.json: partial_rotary_factor must be above 0 and at most 1, got {rope.partial}")
    if rope.kind == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        raise ModelError(f"config.json: {key} needs 0 < low_freq_factor < high_freq_factor")


def _label_index(key: Any) -> int:
    if not str(key).isdecimal():
        raise ModelError(f"config.json: id2label must have numbers for keys, got {key!r}")
    return int(key)


def _spell_roberta(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its positions begin behind the padding token's, so that the table is longer than the context."""
    keys = _Keys(raw)
    return {**raw, "max_position_embeddings": keys.integer("max_position_embeddings") - padding_index(raw) - 1}


def padding_index(raw: Mapping[str, Any]) -> int:
    """RoBERTa's padding token."""
    return int(_Keys(raw).number("pad_token_id", 1.0))


def _spell_modernbert(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`local_attention` is the whole window; each kind of layer has a rope of its own, of which this is the global one."""
    keys = _Keys(raw)
    ropes = _table(raw, "rope_parameters") or {}
    every = keys.integer("global_attn_every_n_layers", 3)
    kinds = [
        "sliding_attention" if index % every else "full_attention" for index in range(keys.integer("num_hidden_layers"))
    ]
    return {
        **raw,
        "hidden_act": raw.get("hidden_activation", "gelu"),
        "layer_types": raw.get("layer_types") or kinds,
        "sliding_window": keys.integer("local_attention", 128) // 2,
        "rope_parameters": ropes.get("full_attention") or {"rope_theta": keys.number("global_rope_theta", 160000.0)},
    }


_SPELLINGS: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "roberta": _spell_roberta,
    "xlm-roberta": _spell_roberta,
    "camembert": _spell_roberta,
    "modernbert": _spell_modernbert,
}
