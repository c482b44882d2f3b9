"""What is asked of the server: prompts of wanted lengths, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEXT = (
    "the of and to in is it you that he was for on are with as his they be at one have this from or had by not but what "
    "all were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my than "
    "first water been call who oil its now find long down day did get come made may part"
)
_WORDS = _TEXT.split()


class DatasetError(ValueError):
    """The dataset cannot be used as asked; the message says why."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt (text, token ids or chat messages), its length as far as known here, and how many tokens to ask for."""

    prompt: str | list[int] | list[dict[str, Any]]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLengths:
    """Lengths drawn evenly from mean × (1 ± range_ratio), behind a prefix that all prompts share."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise DatasetError(f"the range ratio must be at least 0 and below 1, got {self.range_ratio:g}")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise DatasetError("input and output lengths must be at least 1, the prefix length at least 0")

    def draw(self, mean: int, rng: random.Random) -> int:
        """One length."""
        return rng.randint(max(1, round(mean * (1 - self.range_ratio))), max(1, round(mean * (1 + self.range_ratio))))


def random_token_ids(num: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Ids of the middle of the vocabulary: special tokens mostly stand at its ends."""
    low, high = vocab_size // 8, max(vocab_size // 8 + 1, vocab_size - vocab_size // 8)
    return [rng.randrange(low, high) for _ in range(num)]


def random_requests(
    num: int,
    lengths: RandomLengths,
    seed: int,
    *,
    vocab_size: int | None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[BenchRequest]:
    """Prompts of random token ids where the vocabulary's size is known (as text, with `decode`), else of common words."""
    rng = random.Random(seed)

    def draw(count: int) -> list[Any]:
        return random_token_ids(count, vocab_size, rng) if vocab_size else rng.choices(_WORDS, k=count)

    prefix, requests = draw(lengths.prefix_len), []
    for _ in range(num):
        num_input, num_output = lengths.draw(lengths.input_len, rng), lengths.draw(lengths.output_len, rng)
        parts = prefix + draw(num_input)
        prompt: str | list[int] = parts if vocab_size else " ".join(parts)
        if vocab_size and decode:
            prompt = decode(parts)
        requests.append(BenchRequest(prompt, len(parts), num_output))
    return requests


def sharegpt_requests(
    path: Path, num: int, seed: int, *, count: Callable[[str], int], output_len: int | None = None
) -> list[BenchRequest]:
    """First question and the length of its answer, of conversations in ShareGPT's JSON. vLLM's bounds on lengths."""
    rng, requests = random.Random(seed), list[BenchRequest]()
    conversations = _read_json(path)
    if not isinstance(conversations, list):
        raise DatasetError(f"{path.name} must hold a JSON list of conversations")
    pairs = [pair for entry in conversations if (pair := _first_exchange(entry)) is not None]
    rng.shuffle(pairs)
    for question, answer in pairs:
        if len(requests) == num:
            break
        num_input, num_output = count(question), output_len or count(answer)
        if num_input >= 4 and num_output >= 4 and num_input <= 1024 and num_input + num_output <= 2048:
            requests.append(BenchRequest(question, num_input, num_output))
    return _repeated(requests, num, path)


def _first_exchange(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    return str(turns[0].get("value", "")), str(turns[1].get("value", ""))


def custom_requests(
    path: Path, num: int, *, count: Callable[[str], int], output_len: int | None = None
) -> list[BenchRequest]:
    """JSON lines with `prompt` (text or token ids) or `messages`, and `output_tokens` where they differ."""
    requests = list[BenchRequest]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and len(requests) < num:
            requests.append(_custom_request(line, f"{path.name}, line {number}", count, output_len))
    return _repeated(requests, num, path)


def _custom_request(line: str, where: str, count: Callable[[str], int], output_len: int | None) -> BenchRequest:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON: {error}") from None
    prompt = entry.get("prompt", entry.get("messages")) if isinstance(entry, dict) else None
    if not prompt or not isinstance(prompt, str | list):
        raise DatasetError(f'{where}: expected an object with a "prompt" or "messages"')
    wanted = output_len or entry.get("output_tokens", 256)
    if not isinstance(wanted, int) or wanted < 1:
        raise DatasetError(f"{where}: output_tokens must be an integer of at least 1, got {wanted!r}")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return BenchRequest(prompt, sum(count(str(m.get("content", ""))) for m in prompt), wanted)
    return BenchRequest(prompt, count(prompt) if isinstance(prompt, str) else len(prompt), wanted)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path.name}: not JSON: {error}") from None


def _repeated(requests: Sequence[BenchRequest], num: int, path: Path) -> list[BenchRequest]:
    """As many as wanted: from the start again where the file has fewer."""
    if not requests:
        raise DatasetError(f"{path.name} holds no usable prompt")
    return [requests[i % len(requests)] for i in range(num)]
