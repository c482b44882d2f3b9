"""Fixtures for authors of plugins; pytest finds them by itself where llmd is installed. Nothing heavy before a test asks.

`llmd_tiny_model`  the folder of a tiny Llama with a tokenizer of bytes and no weights (load_format="dummy")
`llmd_engine`      makes an LLM of it: `llmd_engine(quantization="zeta", config={…})`, keywords of LLM, keys of config.json
`llmd_server`      starts a daemon with it: `llmd_server("--api-key", "k", ENVIRONMENT="value")` → Server
`llmd_paged_kv`    PagedRows: a scattered KV pool and batches over it
`llmd_triton`      runs Python source in a process where Triton kernels are interpreted on the CPU
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from llmd.api.v1 import LLM
    from llmd.api.v1.testing import PagedRows, Server


@pytest.fixture(scope="session")
def llmd_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama: 258 tokens (each byte one), context 512, no weights."""
    from llmd.api.v1.testing import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def llmd_engine(tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    """Makes engines in this process, on the CPU with random weights; they are shut down when the test ends."""
    from llmd.api.v1 import LLM
    from llmd.api.v1.testing import make_tiny_model

    with ExitStack() as stack:

        def make(*, config: dict[str, Any] | None = None, **options: Any) -> LLM:
            folder = make_tiny_model(tmp_path / "engine-model", **(config or {}))
            given = {"load_format": "dummy", "device": "cpu", "dtype": "float32", **options}
            return stack.enter_context(LLM(model=str(folder), **given))

        yield make


@pytest.fixture
def llmd_server(llmd_tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Starts daemons of their own, ready to serve the tiny model; they are stopped when the test ends."""
    from llmd.api.v1.testing import Server

    with ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> Server:
            given = ("--load-format", "dummy", "--device", "cpu", "--dtype", "float32", *arguments)
            return stack.enter_context(Server(str(llmd_tiny_model), *given, **environment))

        yield start


@pytest.fixture
def llmd_paged_kv() -> type[PagedRows]:
    """PagedRows."""
    from llmd.api.v1.testing import PagedRows

    return PagedRows


@pytest.fixture
def llmd_triton() -> Callable[[str], str]:
    """Runs source with TRITON_INTERPRET=1, which must be set before the first kernel is defined; what it printed.

    AssertionError with the traceback where it fails.
    """

    def run(source: str) -> str:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
        ended = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise AssertionError(f"under the Triton interpreter:\n{ended.stderr}")
        return ended.stdout

    return run
