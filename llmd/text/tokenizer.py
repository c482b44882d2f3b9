"""Text ↔ token ids. `tokenizer.json` is read by `tokenizers` alone; transformers is loaded only for folders without one.

What transformers adds to tokenizer.json is added here too: special tokens that only tokenizer_config.json or
special_tokens_map.json name. Whether BOS and EOS are put around a text is what tokenizer.json says.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llmd.errors import InvalidRequest, ModelError, Overloaded
from llmd.text.chat_files import read_templates
from llmd.text.detokenizer import (
    CompactDetokenizer,
    Detokenizer,
    Pieces,
    Rules,
    TableDetokenizer,
    WindowDetokenizer,
    read_rules,
)

logger = logging.getLogger(__name__)

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ASYNC_FROM_LENGTH = 2000  # characters; shorter texts take less time than a hop to a thread and back is worth
MAX_WAITING_ENCODES = 1024
ENCODE_THREADS = 2


T = TypeVar("T")


class Tokenizer:
    """A model's tokenizer. Every method but `encode_async` may be called from any thread."""

    def __init__(self, backend: Any, config: Mapping[str, Any], templates: Mapping[str, str], name: str = "") -> None:
        """`backend` is a tokenizers.Tokenizer or a SlowBackend; `config` the merged facts of the JSON files."""
        self._backend, self.config, self.name = backend, config, name
        self.chat_templates = dict(templates)
        self.added_tokens: dict[int, str] = {
            token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self.special_tokens: dict[str, str] = {key: text for key in SPECIAL_NAMES if (text := _content(config.get(key)))}
        self.special_ids = self._special_ids()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._rules: Rules | None = None if isinstance(backend, SlowBackend) else read_rules(backend.decoder)
        self._pieces: dict[bool, Pieces] = {}
        self._longest_token: int | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._num_waiting = 0

    @classmethod
    def from_folder(cls, path: Path | str, *, trust_remote_code: bool = False) -> Tokenizer:
        """Read a model's folder. Raises ModelError, naming the file, when that cannot be done."""
        path = Path(path)
        config = read_config(path)
        templates = read_templates(path, config)
        has_own_code = isinstance(config.get("auto_map"), Mapping) and "AutoTokenizer" in config["auto_map"]
        if (path / "tokenizer.json").is_file() and not (has_own_code and trust_remote_code):
            backend = _read_backend(path)
            _add_special_tokens(backend, config)
        else:
            backend = _load_with_transformers(path, has_own_code, trust_remote_code)
            config = {**config, **backend.facts}
        return cls(getattr(backend, "rust", None) or backend, config, templates, path.name)

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.chat_templates.get("default")

    @property
    def serialized(self) -> str | None:
        """tokenizer.json's text, special tokens added; None for tokenizers that have no such form."""
        return None if isinstance(self._backend, SlowBackend) else self._backend.to_str()

    @property
    def bos_token_id(self) -> int | None:
        """What starts a text."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """What ends a text."""
        return self._named_id("eos_token")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest when it is not valid Unicode."""
        check_unicode(text)
        if isinstance(self._backend, SlowBackend):
            return self._backend.encode(text, add_special_tokens)
        # `encode` of tokenizers reckons offsets, which takes as long again, and keeps the GIL all the while
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_parts(
        self, text: str, other: str | None = None, *, max_length: int | None = None, max_other_length: int | None = None
    ) -> Encoded:
        """A text, or a pair of texts as the model was taught to read them, with special tokens.

        More than `max_length` tokens are cut: off the end of the longer text, special tokens stay. Raises InvalidRequest.
        """
        for given in (text, other):
            if given is not None:
                check_unicode(given)
        if isinstance(self._backend, SlowBackend):
            return self._backend.encode_parts(text, other, max_length, max_other_length)
        backend = self._backend
        texts = [text] if other is None else [text, other]
        parts = [backend.encode_batch_fast([part], add_special_tokens=False)[0] for part in texts]
        if max_other_length is not None and other is not None:
            parts[1].truncate(max_other_length)
        if max_length is not None:
            room = max(0, max_length - backend.num_special_tokens_to_add(other is not None))
            for part, length in zip(parts, _shares([len(part.ids) for part in parts], room), strict=True):
                part.truncate(length)
        encoding = backend.post_process(*parts, add_special_tokens=True)
        return Encoded(encoding.ids, encoding.type_ids)

    def prefix(self, text: str, num_tokens: int) -> str:
        """The part of a text that its first so many tokens stand for; a character is never cut."""
        if isinstance(self._backend, SlowBackend):
            return self.decode(self.encode(text, add_special_tokens=False)[:num_tokens], skip_special_tokens=False)
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= num_tokens:
            return text
        return text[: offsets[num_tokens - 1][1]] if num_tokens > 0 else ""

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As `encode`; a long text is encoded in a thread, so that the loop goes on."""
        return await self.off_loop(len(text), partial(self.encode, text, add_special_tokens=add_special_tokens))

    async def off_loop(self, length: int, call: Callable[[], T]) -> T:
        """The result of a call that encodes `length` characters; made in a thread where they are many."""
        if length < ASYNC_FROM_LENGTH:
            return call()
        if self._num_waiting >= MAX_WAITING_ENCODES:
            raise Overloaded(f"{self._num_waiting} long prompts wait to be tokenized", retry_after_s=1.0)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="llmd-encode")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        finally:
            self._num_waiting -= 1

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids at once; ids outside the vocabulary add nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """A fresh detokenizer for a sequence that continues `prompt_ids`."""
        detokenizer: Detokenizer
        if self._rules is None:
            detokenizer = WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))
        elif skip_special_tokens or spaces_between_special_tokens or not self.added_tokens:
            detokenizer = TableDetokenizer(self._table(skip_special_tokens))
        else:
            detokenizer = CompactDetokenizer(self._table(False), self.added_tokens)
        if prompt_ids:
            detokenizer.prime(prompt_ids)
        return detokenizer

    def token_text(self, token_id: int) -> str:
        """What one token adds inside a text; U+FFFD for a part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """As `token_text`, exact."""
        if self._rules is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        piece = self._table(False)[token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    def max_text_length(self, num_tokens: int) -> int:
        """Characters that a text of `num_tokens` tokens can have at most: a longer one need not be tokenized."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        return num_tokens * self._longest_token

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _table(self, skip_special_tokens: bool) -> Pieces:
        if skip_special_tokens not in self._pieces:
            assert self._rules is not None
            silent_ids = self.special_ids if skip_special_tokens else frozenset()
            self._pieces[skip_special_tokens] = Pieces(self._rules, self._backend.id_to_token, silent_ids)
        return self._pieces[skip_special_tokens]

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder().items()
        return frozenset(token_id for token_id, token in added if token.special) | frozenset(
            token_id for name in SPECIAL_NAMES if (token_id := self._named_id(name)) is not None
        )


class Encoded(NamedTuple):
    """Token ids, and which of the texts each belongs to as the model was taught it."""

    token_ids: list[int]
    token_types: list[int]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """What is kept of each text when they must fit together: the longer one is cut first."""
    if sum(lengths) <= room or len(lengths) == 1:
        return [min(length, room) for length in lengths]
    shorter = min(min(lengths), room // 2)
    return [shorter if index == lengths.index(min(lengths)) else room - shorter for index in range(2)]


class SlowBackend:
    """A tokenizer of transformers, through the methods of tokenizers.Tokenizer that we use. `rust` is set if it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.rust = getattr(tokenizer, "backend_tokenizer", None)
        self.facts = {name: getattr(tokenizer, name) for name in SPECIAL_NAMES if getattr(tokenizer, name, None)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_parts(self, text: str, other: str | None, max_length: int | None, max_other_length: int | None) -> Encoded:
        """As Tokenizer has it."""
        limit: dict[str, Any] = {}
        if max_length is not None:
            limit = {"max_length": max_length, "truncation": "longest_first"}
        if other is not None and max_other_length is not None:
            excess = len(self.encode(other, False)) - max_other_length
            length = len(self._tokenizer(text, other)["input_ids"]) - excess
            if excess > 0 and (max_length is None or length <= max_length):
                limit = {"max_length": length, "truncation": "only_second"}
        encoding = self._tokenizer(text, other, return_token_type_ids=True, **limit)
        return Encoded(list(encoding["input_ids"]), list(encoding["token_type_ids"]))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text."""
        known = [token_id for token_id in ids if 0 <= token_id < len(self._tokenizer)]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token."""
        return self._tokenizer.get_vocab().get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id."""
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def get_vocab_size(self, with_added_tokens: bool) -> int:
        """How many tokens there are."""
        return len(self._tokenizer) if with_added_tokens else self._tokenizer.vocab_size

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        """Token → id."""
        return self._tokenizer.get_vocab()

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Id → added token."""
        return self._tokenizer.added_tokens_decoder


def check_unicode(text: str, param: str = "prompt") -> None:
    """Raise InvalidRequest for a text with half a surrogate pair, which no encoding of Unicode can hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} is not valid Unicode: character {error.start} is half of a surrogate pair", param=param
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a model's folder, empty when there is no such file. Raises ModelError when it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent.name}/{path.name} must be a JSON object, not a {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json over it where transformers would do the same."""
    config = read_json(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config.update(read_json(path / "special_tokens_map.json"))
    return config


def _content(token: Any) -> str | None:
    """The text of a token written as a string or as an AddedToken object."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return str(token) if token else None


def _read_backend(path: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time needs no pool of threads
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as error:
        raise ModelError(
            f"{path.name}/tokenizer.json is broken or too new for the installed tokenizers ({error}): "
            "download it again or upgrade tokenizers"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_special_tokens(backend: Any, config: Mapping[str, Any]) -> None:
    """Special tokens that tokenizer.json does not know as such, as transformers adds them."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder") or {}
    known = set(backend.get_added_tokens_decoder())
    for token_id, facts in sorted(decoder.items(), key=lambda item: int(item[0])):
        if int(token_id) not in known and isinstance(facts, Mapping):
            backend.add_tokens([AddedToken(**{key: value for key, value in facts.items() if key != "__type"})])
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _special_texts(config)])


def _special_texts(config: Mapping[str, Any]) -> Iterable[str]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, str | Mapping)]
    values = [*named, *(extra.values() if isinstance(extra, Mapping) else extra)]
    return dict.fromkeys(text for value in values if (text := _content(value)))


def _load_with_transformers(path: Path, has_own_code: bool, trust_remote_code: bool) -> SlowBackend:
    _check_loadable(path, has_own_code, trust_remote_code)
    logger.info("no tokenizer.json in %s: its tokenizer is loaded with transformers, which takes longer", path.name)
    from transformers import AutoTokenizer

    try:
        return SlowBackend(AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code))
    except Exception as error:
        reason = str(error).strip().replace(str(path), path.name).split("\n")[0] or type(error).__name__
        raise ModelError(
            f"transformers cannot load the tokenizer of {path.name} ({reason}): add a tokenizer.json to the folder, "
            "or install what it asks for (sentencepiece, tiktoken)"
        ) from error


def _check_loadable(path: Path, has_own_code: bool, trust_remote_code: bool) -> None:
    if has_own_code and not trust_remote_code:
        raise ModelError(
            f"the tokenizer of {path.name} is code of its own and there is no tokenizer.json: "
            "set trust_remote_code = true if you trust it"
        )
    names = ("*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
    if not has_own_code and not any(file for name in names for file in path.glob(name)):
        raise ModelError(
            f"no tokenizer in {path.name}: tokenizer.json is missing (or tokenizer.model, vocab.json, vocab.txt); "
            "download it, or set tokenizer to a folder that has one"
        )
