"""Thread rules as assertions: the loop thread owns requests, the executor thread owns tensors."""

from __future__ import annotations

import threading
from typing import Any


class _OneThread:
    """Passes everything on, and remembers who came first."""

    def __init__(self, target: Any) -> None:
        self._target, self._owner = target, None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            if self.__dict__["_owner"] is None:
                self.__dict__["_owner"] = thread
            owner = self.__dict__["_owner"]
            if thread is not owner:
                kind = type(self._target).__name__
                raise AssertionError(f"{kind}.{name} is called on thread {thread.name!r}; its owner is {owner.name!r}")
            return value(*args, **kwargs)

        return call


def on_one_thread(target: Any) -> Any:
    """`target` behind a guard: once one thread has called a method, calls on any other raise AssertionError."""
    return _OneThread(target)
