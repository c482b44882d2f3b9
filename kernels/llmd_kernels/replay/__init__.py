"""Record the native calls of a piece of work once, then run them again without Python: what CUDA graphs are to a GPU.

    with Recording(pool) as recording:      every call is made and written down with its arguments
        logits = model(batch)
    recording.replay()                      the same calls, one team of threads, in the memory they had

Only what is written down comes again. So a recording watches torch too: new tensors come from a pool whose memory stays,
views cost nothing, and any other operation is named in `missed`, which makes the recording unusable.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmd_kernels import native

log = logging.getLogger("llmd.kernels")

_SMALLEST = mmap.PAGESIZE
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
}
_FREE_OF_WORK = {torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default, torch.ops.aten._unsafe_view.default}


class Pool:
    """Memory that recordings work in. It stays until the pool goes; recordings share it, for only one runs at a time."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by size, powers of two
        self._taken: dict[int, mmap.mmap] = {}  # by address
        self.num_bytes = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], at the start of a page; the memory comes back when the last tensor over it is gone."""
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        chunks = self._free.get(size)
        chunk = chunks.pop() if chunks else self._new(size)
        array = (ctypes.c_ubyte * num_bytes).from_buffer(chunk)
        address = ctypes.addressof(array)
        self._taken[address] = chunk
        weakref.finalize(array, self._give, address)
        return torch.frombuffer(array, dtype=torch.uint8)

    def give_all(self) -> None:
        """A recording is done: the next one may work in the same memory, though this one's results lie there."""
        for address in list(self._taken):
            self._give(address)

    def _new(self, size: int) -> mmap.mmap:
        self.num_bytes += size
        return mmap.mmap(-1, size)

    def _give(self, address: int) -> None:
        chunk = self._taken.pop(address, None)
        if chunk is not None:
            self._free.setdefault(len(chunk), []).append(chunk)


class Recording(TorchDispatchMode):
    """The native calls made while it is entered, on the thread that entered it."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self._calls: list[tuple[int, ctypes.Array[Any]]] = []
        self._kept: list[Any] = []  # small arrays that arguments point to
        self._table: ctypes.Array[Any] | None = None
        self.missed: Counter[str] = Counter()  # operations that a replay would leave out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not asked, torch would import its compiler for this class: 1.9 seconds of every start."""
        return False

    @property
    def num_calls(self) -> int:
        """How many native calls were made."""
        return len(self._calls)

    def __enter__(self) -> Recording:
        native.record_to(self._add)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        native.record_to(None)
        if not self.missed:  # else whoever keeps a tensor of it goes on with it, and no replay will write there
            self._pool.give_all()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY:
            return self._empty(func(*args, **{**kwargs, "device": "meta"}))
        result = func(*args, **kwargs)
        if not (func.is_view or func in _FREE_OF_WORK) and _is_about_tensors((args, kwargs, result)):
            self.missed[str(func)] += 1
        return result

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        num_bytes = span * like.element_size() if like.numel() else 0
        flat = self._pool.take(max(num_bytes, 1))[:num_bytes].view(like.dtype)
        return flat.as_strided(like.shape, like.stride())

    def _add(self, name: str, address: int, arguments: ctypes.Array[Any], given: tuple[Any, ...]) -> None:
        if address:
            self._calls.append((address, arguments))
            self._kept.extend(value for value in given if isinstance(value, ctypes.Array))
        else:
            self.missed[name] += 1

    def replay(self) -> None:
        """Make the calls again. Raises ValueError where the recording misses some of the work."""
        if self.missed:
            raise ValueError(f"cannot be replayed: {', '.join(sorted(self.missed))}")
        if self._table is None:
            self._table = (ctypes.c_void_p * (2 * len(self._calls)))()
            for index, (address, arguments) in enumerate(self._calls):
                self._table[2 * index] = address
                self._table[2 * index + 1] = ctypes.addressof(arguments)
        lib = native.library()
        assert lib is not None
        lib.llmd_replay(ctypes.addressof(self._table), len(self._calls))


def _is_about_tensors(values: Any) -> bool:
    """Whether any of what an operation took and gave is a tensor; others ask what the machine can do."""
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(values))
