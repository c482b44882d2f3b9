"""A pytest plugin for a process whose kernels are built with LLMD_KERNEL_FLAGS: a few of each op's tests."""

import os

import pytest

from llmd_kernels import native

PER_FUNCTION = 3
_NOT_OURS = ("triton", "interpreter", "gpu", "compiler")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build now: tests remove the variable."""
    flags = os.environ["LLMD_KERNEL_FLAGS"].split()
    assert native._flags()[-len(flags) :] == tuple(flags)
    if native.library() is None:
        pytest.exit("the kernels cannot be built with these flags", returncode=9)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first, the last and one in between of each function's parameters."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(word in item.name for word in _NOT_OURS):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = []
    for tests in functions.values():
        step = max(1, (len(tests) - 1) // (PER_FUNCTION - 1))
        kept += tests[::step][: PER_FUNCTION - 1] + tests[-1:] if len(tests) > PER_FUNCTION else tests
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
