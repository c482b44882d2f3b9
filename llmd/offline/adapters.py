"""Adapters as scripts name them: by what `lora_modules` calls them, or with a LoRARequest that says where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.errors import AdapterNotFound

if TYPE_CHECKING:
    from llmd.server.generate import ModelService


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter: its name, and the folder of its files where it is not known by name yet.

    As vLLM's, which tells adapters by the number; here the name does.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    @property
    def name(self) -> str:
        """Its name."""
        return self.lora_name

    @property
    def path(self) -> str:
        """Its folder, or nothing."""
        return self.lora_path


Lora = str | LoRARequest | None


def one_each(given: Lora | Sequence[Lora], num_prompts: int) -> list[LoRARequest | None]:
    """The adapter of each prompt. Raises ValueError where there is another number of them, TypeError for other things."""
    if given is None or isinstance(given, str | LoRARequest):
        return [_as_request(given)] * num_prompts
    if len(given) != num_prompts:
        raise ValueError(f"{len(given)} adapters for {num_prompts} prompts: give one, or one for each")
    return [_as_request(one) for one in given]


def _as_request(given: Lora) -> LoRARequest | None:
    if given is None or isinstance(given, LoRARequest):
        return given
    if not isinstance(given, str):
        raise TypeError(f"lora_request must be a name or a LoRARequest, got {type(given).__name__}")
    return LoRARequest(given)


def as_modules(given: Any) -> Any:
    """`lora_modules` with LoRARequests as 'name=folder'; other values as they are."""
    if isinstance(given, LoRARequest):
        given = [given]
    if isinstance(given, str | dict) or not isinstance(given, Iterable):
        return given
    return [f"{one.name}={one.path}" if isinstance(one, LoRARequest) else _with_text(one) for one in given]


def _with_text(one: Any) -> Any:
    """An entry {name, path} whose path may be a Path."""
    return one | {"path": str(one["path"])} if isinstance(one, dict) and isinstance(one.get("path"), Path) else one


async def make_ready(service: ModelService, wanted: Iterable[LoRARequest | None]) -> None:
    """Load those that are not there. Raises AdapterError, or AdapterNotFound for a name without a folder."""
    for request in {one for one in wanted if one is not None}:
        if request.path:
            await service.adapters.ensure(request.name, str(request.path))
        elif not service.adapters.find(request.name):
            known = ", ".join(repr(info.name) for info in service.adapters.list()) or "none"
            raise AdapterNotFound(f"no adapter is named {request.name!r}; known: {known}", param="lora_request")
