"""The tokenizer that a GGUF file holds, as tokenizer.json and tokenizer_config.json.

Kinds (`tokenizer.ggml.model`): "gpt2", BPE over bytes with one of several ways to cut words (`tokenizer.ggml.pre`), and
"llama", SentencePiece's BPE, whose merges follow from its scores. A file may also hold tokenizer.json itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmd.api.v1 import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_CUTS: dict[str, tuple[str, ...]] = {  # by `pre`; a text is cut by each in turn
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "command-r"), (r"\p{N}", _GPT2)),
    "tekken": (_CASED % ("", "", ""),),
    **dict.fromkeys(("gpt-4o", "llama4"), (_CASED % (f"{_ENGLISH}?", f"{_ENGLISH}?", "{1,3}"),)),
}
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")  # their texts are brought to NFC
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # a word that is a token needs no merges
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # where the file does not say
_SPACE = "▁"


def make_tokenizer(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json. Raises ModelError naming the key that is missing, wrong or not known."""
    config = _config(metadata)
    whole = metadata.get("tokenizer.huggingface.json")
    if isinstance(whole, str):
        return whole, config
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model of the GGUF file must be 'gpt2' or 'llama', got {kind!r}")
    vocabulary = _Vocabulary(metadata)
    made = _byte_level(vocabulary, metadata) if kind == "gpt2" else _sentence_piece(vocabulary, metadata)
    made |= {"version": "1.0", "added_tokens": vocabulary.added()}
    made["post_processor"] = _post_processor(metadata, config, kind)
    return json.dumps(made, ensure_ascii=False), config


class _Vocabulary:
    """Tokens with their types."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokens: list[str] = _strings(metadata, "tokens")
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: list[int] = types if isinstance(types, list) else [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ModelError(
                f"the GGUF file has {len(self.tokens)} tokens, but {len(self.types)} in tokenizer.ggml.token_type"
            )
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ModelError("tokenizer.ggml.tokens of the GGUF file names a token twice")

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text before it is cut."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": token, **flags, "special": kind in (_CONTROL, _UNKNOWN)}
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and token
        ]


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelError(f"tokenizer.ggml.{key} of the GGUF file must be a list of strings, got {value!r:.60}")
    return value


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    plain = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {"type": "BPE", **plain, **changes, "vocab": vocabulary.ids, "merges": merges}


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _CUTS:
        raise ModelError(f"tokenizer.ggml.pre of the GGUF file is {pre!r}; known are {', '.join(_CUTS)}")
    merges = []
    for line in _strings(metadata, "merges"):
        left, space, right = line.partition(" ")
        if not space:
            raise ModelError(f"tokenizer.ggml.merges of the GGUF file holds {line!r:.60}, which is no pair")
        merges.append((left, right))
    cuts = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in _CUTS[pre]]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS),
    }


def _sentence_piece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ModelError(f"tokenizer.ggml.scores of the GGUF file must be {len(vocabulary.tokens)} numbers")
    unknown = next(
        (token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN), None
    )
    with_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if with_prefix else []
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if with_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = _merges(vocabulary, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in vocabulary.types),
    }


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, the best scored tokens first."""
    made = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.ids.get(token[:cut]), vocabulary.ids.get(token[cut:])
            if left is not None and right is not None:
                made.append((-scores[index], left, right))
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(made)]


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, chat templates."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens = metadata.get("tokenizer.ggml.tokens")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None or not isinstance(tokens, list):
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ModelError(f"tokenizer.ggml.{key}_token_id of the GGUF file is {index!r}, of {len(tokens)} tokens")
        config[f"{name}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    others = {
        key.removeprefix("tokenizer.chat_template."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(value, str)
    }
    if isinstance(template, str) and not others:
        config["chat_template"] = template
    elif isinstance(template, str):
        templates = {"default": template} | others
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config


def _post_processor(metadata: Mapping[str, Any], config: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """What is put around a text."""
    puts_bos = metadata.get(
        "tokenizer.ggml.add_bos_token", kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WITH_BOS
    )
    before = _special(config, metadata, "bos") if puts_bos else None
    after = _special(config, metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return None

    def around(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            *([{"SpecialToken": {"id": before[0], "type_id": type_id}}] if before else []),
            {"Sequence": {"id": name, "type_id": type_id}},
            *([{"SpecialToken": {"id": after[0], "type_id": type_id}}] if after else []),
        ]

    specials = {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in filter(None, (before, after))}
    return {
        "type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
        "special_tokens": specials,
    }  # fmt: skip


def _special(config: Mapping[str, Any], metadata: Mapping[str, Any], name: str) -> tuple[str, int] | None:
    token = config.get(f"{name}_token")
    return None if token is None else (token, metadata[f"tokenizer.ggml.{name}_token_id"])
