"""Tests of what a GPU computes: `pytest -m gpu` on a host that has one. Each runs on the CPU too, to be known to work."""

import os
import sys

import pytest
import torch

from llmd.model.executor import is_device_lost

ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *ON_GPU])
def device(request):
    """Where a test runs."""
    return torch.device(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A process whose device is lost would fail all its other tests: among several, another takes its place."""
    report = yield
    if call.excinfo is not None and is_device_lost(call.excinfo.value) and "PYTEST_XDIST_WORKER" in os.environ:
        sys.stderr.write(f"{item.nodeid}: {call.excinfo.value}\n")
        sys.stderr.flush()
        os._exit(70)
    return report
