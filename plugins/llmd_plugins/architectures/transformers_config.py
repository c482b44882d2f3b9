"""What config.json and Transformers' own source say of a model before it is built. Loads no torch, save in `read`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmd.api.v1 import ModelError

_HEADS = ("ForCausalLM", "LMHeadModel")
_KINDS = ("full_attention", "sliding_attention")
_OTHER_MODELS = ("vision_config", "audio_config", "text_config", "thinker_config", "encoder", "decoder")
_OTHER_ATTENTION = {
    "kv_lora_rank": "its attention keeps latent vectors (MLA), not keys and values",
    "attention_chunk_size": "its attention looks back within chunks only (attention_chunk_size)",
    "num_kv_shared_layers": "its layers share keys and values (num_kv_shared_layers)",
    "use_bidirectional_attention": "its tokens see those behind them (use_bidirectional_attention)",
    "alibi": "its attention adds ALiBi to the scores",
}


def why_not(raw: Mapping[str, Any]) -> list[str]:
    """Reasons why a model cannot run through Transformers over paged KV, as far as its config.json tells."""
    return list(_reasons(raw))


def _reasons(raw: Mapping[str, Any]) -> Iterator[str]:
    names = [str(name) for name in raw.get("architectures") or ()]
    if not isinstance(raw.get("model_type"), str):
        yield "config.json names no model_type"
        return
    if raw.get("is_encoder_decoder"):
        yield "it is an encoder with a decoder, which attends to what it does not cache"
    if others := [key for key in _OTHER_MODELS if isinstance(raw.get(key), Mapping)]:
        yield f"it is made of several models ({', '.join(others)}), and only decoders of text run so"
    kinds = raw.get("layer_types")
    odd = sorted({str(kind) for kind in kinds} - set(_KINDS)) if isinstance(kinds, list) else []
    if odd:
        yield f"its layers of the kind {', '.join(odd)} are no attention over paged KV"
    yield from (reason for key, reason in _OTHER_ATTENTION.items() if raw.get(key))
    yield from _class_reasons(next((name for name in names if name.endswith(_HEADS)), None), names, raw)


def _class_reasons(name: str | None, names: list[str], raw: Mapping[str, Any]) -> Iterator[str]:
    if name is None:
        yield f"{', '.join(names)} is no decoder with a language head ({' or '.join(_HEADS)})"
        return
    source = source_of(name)
    if source is None:
        own = "; code in the model's folder is not run" if raw.get("auto_map") else ""
        yield f"Transformers as installed has no {name}{own}"
        return
    if "_is_stateful = True" in source:
        yield "it keeps a recurrent state, not keys and values"
    elif "_supports_attention_backend = True" not in source:
        yield "its code in Transformers does not let attention be replaced"


@cache
def source_of(name: str) -> str | None:
    """The module of Transformers that defines a class, as text: reading it is quicker than importing, and loads no torch."""
    if not name.isidentifier():
        return None
    spec = find_spec("transformers")
    folder = Path((spec.submodule_search_locations or ["."])[0] if spec is not None else ".") / "models"
    defines = re.compile(rf"^class {name}\(", re.MULTILINE)
    bare = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()
    files = sorted(folder.glob("*/modeling_*.py"), key=lambda file: file.parent.name.replace("_", "") != bare)
    for file in files:
        text = file.read_text(encoding="utf-8")
        if defines.search(text):
            return text
    return None


def read(raw: Mapping[str, Any]) -> Any:
    """Transformers' own reading of config.json: a PreTrainedConfig. Raises ModelError for what it does not take."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"config.json: model_type {kind!r} is not one that Transformers as installed knows")
    try:
        return CONFIG_MAPPING[kind].from_dict({key: value for key, value in raw.items() if key != "quantization_config"})
    except Exception as error:  # any class may raise anything about a config
        raise ModelError(f"config.json: Transformers cannot read it: {error}") from error


def spell(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in Llama's words, with the defaults that Transformers knows for what is not said."""
    config = read(raw)
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    spelled = {
        "architectures": raw.get("architectures"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "hidden_size": hidden,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "num_hidden_layers": _number(config, "num_hidden_layers"),
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden,
        "max_position_embeddings": _number(config, "max_position_embeddings"),
        "vocab_size": _number(config, "vocab_size"),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": getattr(config, "layer_types", None),
        "has_attention_sinks": any("s_aux=" in (source_of(name) or "") for name in raw.get("architectures") or ()),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        **{key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "dtype", "torch_dtype", "quantization_config")},
    }
    if getattr(config, "use_sliding_window", True) is False:
        spelled["sliding_window"] = None
    return {key: value for key, value in spelled.items() if value is not None}


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, Transformers reads {value!r}")
    return value


def check_rope(config: Any, max_model_len: int) -> None:
    """Refuse ropes that change with the longest sequence of a batch: one request would change another's answer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    tables = [rope for rope in ropes.values() if isinstance(rope, Mapping)] or [ropes]
    for rope in tables:
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        original = original or config.max_position_embeddings
        if max_model_len > original:
            raise ModelError(
                f"config.json: rope_type {kind!r} changes once a sequence is longer than {original} tokens, for "
                f"all that are computed with it; set max_model_len to at most {original}"
            )
