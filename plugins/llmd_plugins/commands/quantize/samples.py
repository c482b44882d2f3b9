"""Text to calibrate on, as samples of equal length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import ModelError

_MAX_DATA_BYTES = 1 << 30


def read_samples(file: Path, folder: Path, num_samples: int, length: int) -> Tensor:
    """int64 [num_samples, length] of one text behind the other. Raises ModelError when the file is too short or no text."""
    from transformers import AutoTokenizer

    if file.stat().st_size > _MAX_DATA_BYTES:
        raise ModelError(f"--data {file.name} has {file.stat().st_size} bytes; at most {_MAX_DATA_BYTES} are read")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    are_documents = file.suffix == ".jsonl"  # each with its beginning and end; lines of a .txt follow each other
    for text in _texts(file, tokenizer):
        ids += tokenizer(text, add_special_tokens=are_documents, verbose=False)["input_ids"]
        if are_documents and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= num_samples * length:
            break
    count = min(num_samples, len(ids) // length)
    if not count:
        raise ModelError(f"--data {file.name} holds {len(ids)} tokens, not one sample of {length} (--sample-length)")
    return torch.tensor(ids[: count * length]).view(count, length)


def _texts(file: Path, tokenizer: Any) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if file.suffix == ".jsonl":
                    yield _text(file, number, line, tokenizer)
                else:
                    yield line
        except UnicodeDecodeError as error:
            raise ModelError(f"--data {file.name} is no UTF-8 text: {error}") from None


def _text(file: Path, number: int, line: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
        if isinstance(row["messages"] if "messages" in row else row["text"], str):
            return row["text"]
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    except (ValueError, KeyError, TypeError) as error:
        where = f"--data {file.name}, line {number}"
        raise ModelError(f'{where} must be {{"text": …}} or {{"messages": […]}}: {error!r:.200}') from None
