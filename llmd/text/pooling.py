"""How a model's own files say that texts become vectors: sentence-transformers' modules, prompts and lengths.

modules.json                       which hidden states are pooled, and what comes behind (llmd.sentence_files)
sentence_bert_config.json          max_seq_length, do_lower_case
config_sentence_transformers.json  prompts by name, the default one
config.json                        whether vectors may be cut (Matryoshka), and what makes scores of pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmd.errors import InvalidRequest, ModelError
from llmd.sentence_files import read_modules
from llmd.text.tokenizer import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingDefaults:
    """What the files say; None where they say nothing."""

    pooling: str | None = None
    normalize: bool = True
    max_length: int | None = None  # tokens
    is_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # a name of one
    is_matryoshka: bool = False  # the first numbers of a vector are a vector
    matryoshka_dimensions: tuple[int, ...] = ()  # the only lengths to cut to; empty: any
    is_yes_no_reranker: bool = False  # a pair's score is how much likelier "yes" is than "no" behind an instruction

    def prompt(self, name: str | None) -> str:
        """What is put before a text. Raises InvalidRequest for a name that the model does not have."""
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, sorted(self.prompts))) or "none"
            raise InvalidRequest(
                f"prompt_name must be one of the model's prompts ({known}), got {name!r}", param="prompt_name"
            )
        return self.prompts[name]


def read_pooling(folder: Path, overrides: Mapping[str, Any] | None = None) -> PoolingDefaults:
    """Read a model's folder; `overrides` go over config.json. Raises ModelError for what is not served."""
    modules = read_modules(folder)
    sentence = read_json(folder / "sentence_bert_config.json")
    prompts = read_json(folder / "config_sentence_transformers.json")
    config = {**read_json(folder / "config.json"), **(overrides or {})}
    named = {name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)}
    default = prompts.get("default_prompt_name")
    if default is not None and default not in named:
        raise ModelError(f"{folder.name}/config_sentence_transformers.json: default_prompt_name {default!r} is no prompt")
    if not modules.includes_prompt and any(named.values()):
        raise ModelError(
            f"{folder.name}/modules.json: include_prompt must be true: vectors without the prompt's tokens are not served"
        )
    length = sentence.get("max_seq_length")
    lengths = _matryoshka_dimensions(folder, config.get("matryoshka_dimensions"))
    return PoolingDefaults(
        pooling=modules.pooling,
        normalize=modules.normalizes,
        max_length=length if isinstance(length, int) and length > 0 else None,
        is_lower_case=sentence.get("do_lower_case") is True,
        prompts=named,
        default_prompt=default,
        is_matryoshka=bool(lengths) or config.get("is_matryoshka") is True,
        matryoshka_dimensions=lengths,
        is_yes_no_reranker=config.get("is_original_qwen3_reranker") is True,
    )


def _matryoshka_dimensions(folder: Path, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(item) is int and item > 0 for item in value):
        raise ModelError(f"{folder.name}/config.json: matryoshka_dimensions must be a list of lengths, got {value!r}")
    return tuple(value)
