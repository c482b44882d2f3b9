"""A CUDA device that computes nothing: tensors on it know shape and dtype alone, kernels are counted, and every way in which the
host would wait for the device is written down.

Tensors on the CPU stay real. What the host reads off the device are zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default)
SIZES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor)


class FakeCuda(TorchDispatchMode):
    """Active between __enter__ and __exit__; `waits` and `launches` are what happened."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.copies_to_host: list[str] = []  # that nobody waits for
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_there = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        goes_there = device is not None and torch.device(device).type == "cuda"
        if not is_there and not goes_there:
            return func(*args, **{**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs)
        if is_there and (answer := self._to_host(func, args, kwargs, goes_there)) is not None:
            return answer
        with self._fakes:
            return func(*args, **kwargs)

    def _to_host(self, func, args, kwargs, goes_there):
        """What the host gets where it reads the device; None where it does not."""
        source = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor))
        if func in READS:
            self.waits.append(f"{func} of {tuple(source.shape)}")
            return torch.zeros((), dtype=source.dtype).item()
        if func in SIZES and kwargs.get("output_size") is None:
            self.waits.append(f"{func} of {tuple(source.shape)}")
            raise RuntimeError(f"{func} waits for the device")
        if func is aten._to_copy.default and not goes_there and kwargs.get("device") is not None:
            kind = self.copies_to_host if kwargs.get("non_blocking") else self.waits
            kind.append(f"{func} of {tuple(source.shape)}")
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            (self.copies_to_host if is_async else self.waits).append(f"{func} of {tuple(source.shape)}")
            return args[0].zero_()
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.waits.append(f"{func} by a mask {tuple(source.shape)}")
            raise RuntimeError("indexing by a mask waits for the device")
        return None


class Event:
    """torch.cuda.Event."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device

    def record(self, stream=None) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """The host waits."""
        self._device.waits.append("event")


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """A machine with one such device."""
    from triton.runtime.jit import JITFunction

    device = FakeCuda()
    facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="fake", total_memory=80 << 30, gcnArchName="")
    patches = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": lambda: None,
        "get_device_properties": lambda *_: facts, "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (70 << 30, 80 << 30), "Event": lambda **_: Event(device),
        "synchronize": lambda *_: device.waits.append("synchronize"), "empty_cache": lambda: None,
    }  # fmt: skip

    def launch(self, *args, grid, warmup=False, **kwargs):
        device.launches.append(self.fn.__name__)

    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(device)
        yield device
