"""The process that holds one engine: orders come as JSON lines on stdin, each is answered by a JSON line on stdout.

    python host.py ADAPTER        a module of engines/, or the path of one

It needs nothing but the interpreter that has the engine installed.

| order | answer |
|---|---|
| `{"op": "load", "model": …, "options": {…}}` | `{"seconds": …, "facts": {…}}` |
| `{"op": "prepare", "num_seqs": …, "max_len": …}` | `{"seconds": …}` |
| `{"op": "generate", "prompts": [[…], …], "num_tokens": …}` | `{"seconds": …, "counts": […], "first": […]}` |
| `{"op": "quit"}`, or the end of stdin | nothing: the process ends |

Whatever fails is answered by `{"error": …}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from engines import die_with_parent

HERE = str(Path(__file__).resolve().parent)


def load_adapter(name: str) -> ModuleType:
    """A module of engines/ by its name, or one by its path."""
    if not name.endswith(".py"):
        return importlib.import_module(f"engines.{name}")
    spec = importlib.util.spec_from_file_location("engines.given", name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Host:
    """Carries out orders on one engine."""

    def __init__(self, adapter: ModuleType) -> None:
        self._adapter = adapter
        self._engine: Any = None

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order."""
        began = time.perf_counter()
        found = getattr(self, f"_{order.pop('op')}")(**order)
        return {"seconds": time.perf_counter() - began} | found

    def _load(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        self._engine = self._adapter.Engine(model, options)
        return {"facts": self._engine.facts()}

    def _prepare(self, num_seqs: int, max_len: int) -> dict[str, Any]:
        self._engine.prepare(num_seqs, max_len)
        return {}

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        return self._engine.generate(prompts, num_tokens)._asdict()

    def close(self) -> None:
        """Let the engine go."""
        if self._engine is not None:
            self._engine.close()


def main() -> None:
    """Serve until stdin ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    host = Host(load_adapter(sys.argv[1]))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]  # no module here shadows an engine's
    for line in sys.stdin:
        order = json.loads(line)
        if order["op"] == "quit":
            break
        try:
            answer = host.answer(order)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    host.close()


if __name__ == "__main__":
    main()
