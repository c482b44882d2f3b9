"""What the pooling routes know of other servers' fields, and bounds that are looked at before each entry is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from llmd.api.v1 import InvalidRequest, parse_request

# Fields of other servers' requests that are known and not served, and the values of theirs that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "media_io_kwargs": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "embedding_types": (["float"],),
    "embedding_type": ("float",),
    "late_chunking": (False,),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
    "mm_processor_kwargs": (),
    "softmax": (),
    "activation": (),
    "truncate": (False, "NONE"),
    "cache_salt": (),
}

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The validated request. Raises InvalidRequest with the path of the first field that is wrong."""
    return parse_request(model, body, UNSERVED)


def check_messages(value: Any, limit: int) -> None:
    """As many messages as a conversation may have; looked at before each is."""
    if isinstance(value, list) and len(value) > limit:
        message = f"messages has {len(value)} entries, at most {limit} are allowed (limits.max_messages)"
        raise InvalidRequest(message, param="messages", code="invalid_value")


def check_length(name: str, value: Any, limit: int) -> None:
    """A list has at most `limit` entries; looked at before each entry is. Token ids of one text are no list of texts."""
    if isinstance(value, list) and len(value) > limit and set(map(type, value)) != {int}:
        message = f"{name} has {len(value)} entries, at most {limit} are allowed (limits.max_inputs)"
        raise InvalidRequest(message, param=name, code="invalid_value")
