"""What all tests share. The environment is set before anything imports torch."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

# CI repeats the same examples, so that it fails for what a change did; elsewhere every run looks at new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No variable of the shell changes a configuration under test."""
    for name in list(os.environ):
        if name.startswith(("LLMD_", "VLLM_")):
            monkeypatch.delenv(name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is skipped for want of a GPU is what `-m gpu` runs."""
    for item in items:
        if any(mark.kwargs.get("reason") == "no GPU" for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")
