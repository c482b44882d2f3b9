"""What all tests share. The environment is set before anything imports torch."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No variable of the shell changes a configuration under test."""
    for name in list(os.environ):
        if name.startswith(("LLMD_", "VLLM_")):
            monkeypatch.delenv(name)
