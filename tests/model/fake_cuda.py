"""A CUDA device that computes nothing: its tensors know shape and dtype alone, launches are counted, waits written down.

Tensors on the CPU stay real. What the host reads off the device are zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default)
SIZES = (
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor,
    aten.repeat_interleave.self_Tensor,
)  # fmt: skip
COPIES = (aten._to_copy.default, aten.to.device, aten.to.dtype_layout)  # the latter two in inference mode


class FakeCuda(TorchDispatchMode):
    """Active between __enter__ and __exit__; `waits` and `launches` are what happened."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that nothing else comes to lie there
        self.waits: list[str] = []
        self.copies_to_host: list[str] = []  # that nobody waits for
        self.copies_there: list[str] = []
        self.launches: list[str] = []
        self.captures: list[dict] = []

    def clear(self) -> None:
        """Forget what happened."""
        for happened in (self.waits, self.copies_to_host, self.copies_there, self.launches, self.captures):
            happened.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_there = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device") or next((arg for arg in args if isinstance(arg, torch.device)), None)
        goes_there = device is not None and torch.device(device).type == "cuda"
        if not is_there and not goes_there:
            return self._on_host(func, args, kwargs)
        if is_there and (answer := self._to_host(func, args, kwargs, goes_there)) is not None:
            return answer
        if func.name().startswith(("aten::_to_copy", "aten::to.")) and not is_there:
            self._leaves_host(args[0], _is_asynchronous(func, args, kwargs))
            with self._fakes:
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cuda")
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with self._fakes:
            return func(*args, **kwargs)

    def _on_host(self, func, args, kwargs):
        """Pinned memory is ordinary memory that is known to be pinned."""
        is_pinned = kwargs.get("pin_memory", False)
        found = func(*args, **{**kwargs, "pin_memory": False} if is_pinned else kwargs)
        if is_pinned:
            self._pinned[found.untyped_storage().data_ptr()] = found
        return found

    def _leaves_host(self, tensor, non_blocking):
        """A copy to the device, which the host may wait for where its memory is not pinned."""
        self.copies_there.append(f"{tuple(tensor.shape)}")
        if tensor.numel() and not (non_blocking and tensor.untyped_storage().data_ptr() in self._pinned):
            self.waits.append(f"a copy of {tuple(tensor.shape)} from ordinary memory")

    def _fake(self, tensor):
        """A tensor of the host among the arguments of a device's op."""
        return tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor)

    def _to_host(self, func, args, kwargs, goes_there):
        """What the host gets where it reads the device; None where it does not."""
        source = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor))
        if func in READS:
            self.waits.append(f"{func} of {tuple(source.shape)}")
            return torch.zeros((), dtype=source.dtype).item()
        if func in SIZES and kwargs.get("output_size") is None:
            self.waits.append(f"{func} of {tuple(source.shape)}")
            raise RuntimeError(f"{func} waits for the device")
        device = kwargs.get("device") or next((arg for arg in args if isinstance(arg, torch.device)), None)
        if func in COPIES and not goes_there and device is not None:
            kind = self.copies_to_host if _is_asynchronous(func, args, kwargs) else self.waits
            kind.append(f"{func} of {tuple(source.shape)}")
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return None

    def copy(self, target, source, non_blocking=False):
        """Tensor.copy_."""
        if not isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
            return _METHODS["copy_"](target, source, non_blocking)
        source.expand(target.shape)  # it must fit
        if not isinstance(source, FakeTensor):
            self._leaves_host(source, non_blocking)
        if not isinstance(target, FakeTensor):
            (self.copies_to_host if non_blocking else self.waits).append(f"copy_ of {tuple(source.shape)}")
            target.zero_()
        return target

    def get(self, tensor, index):
        """tensor[index]."""
        if not self._is_there(tensor, index):
            return _METHODS["__getitem__"](tensor, index)
        tensor, index = tree_map_only(torch.Tensor, self._fake, (tensor, index))
        with in_kernel_invocation_manager(self._fakes):
            found = _METHODS["__getitem__"](tensor, index)
        return FakeTensor(self._fakes, found, torch.device("cuda:0"))

    def set(self, tensor, index, value):
        """tensor[index] = value."""
        if not self._is_there(tensor, index, value):
            _METHODS["__setitem__"](tensor, index, value)

    def nonzero(self, tensor, *, as_tuple=False):
        """tensor.nonzero()."""
        if isinstance(tensor, FakeTensor):
            self.waits.append(f"nonzero of {tuple(tensor.shape)}")
            raise RuntimeError("nonzero waits for the device")
        return _METHODS["nonzero"](tensor, as_tuple=as_tuple)

    def _is_there(self, *things):
        """Whether any of them is on the device; the host waits for the size of what a mask chooses."""
        leaves = tree_leaves(things)
        is_there = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if is_there and any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(things[1])):
            self.waits.append(f"indexing by a mask of {tuple(things[0].shape)}")
            raise RuntimeError("indexing by a mask waits for the device")
        return is_there


def _is_asynchronous(func, args, kwargs) -> bool:
    """`non_blocking` of a copy: the fourth argument of Tensor.to(device, dtype, …)."""
    return bool(kwargs.get("non_blocking") or (func is aten.to.device and len(args) > 3 and args[3]))


# torch looks for a guard of the tensor's device in these before any mode sees them.
_METHODS = {name: getattr(torch.Tensor, name) for name in ("copy_", "__getitem__", "__setitem__", "nonzero")}


class Event:
    """torch.cuda.Event."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device

    def record(self, stream=None) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """The host waits."""
        self._device.waits.append("event")

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        return 1.0


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device

    def capture_begin(self, **options) -> None:
        """What is launched from now on is written down."""
        self._device.captures.append(options)
        self._before = len(self._device.launches)

    def capture_end(self) -> None:
        """Nothing of it was launched."""
        self.launches = self._device.launches[self._before :]
        del self._device.launches[self._before :]

    def replay(self) -> None:
        """One launch."""
        self._device.launches.append("replay")


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, *_) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """The device waits, not the host."""

    def wait_event(self, event: Event) -> None:
        """The device waits, not the host."""


def _as_method(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


class Driver:
    """Triton's, for a device that is only compiled for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def fake_cuda(*, compiles: bool = False) -> Iterator[FakeCuda]:
    """A machine with one such device. `compiles`: each launch compiles what a real one would, with its very arguments."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    device = FakeCuda()
    facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="fake", total_memory=80 << 30, gcnArchName="")
    patches = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": lambda: None,
        "get_device_properties": lambda *_: facts, "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (70 << 30, 80 << 30), "Event": lambda **_: Event(device),
        "graph_pool_handle": lambda: (0, 1), "memory_reserved": lambda *_: 0, "CUDAGraph": lambda: Graph(device),
        "Stream": Stream, "current_stream": lambda *_: Stream(), "stream": lambda _: contextlib.nullcontext(),
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: device.waits.append("synchronize"), "empty_cache": lambda: None,
    }  # fmt: skip

    run = JITFunction.run

    def launch(self, *args, grid, warmup=False, **kwargs):
        device.launches.append(self.fn.__name__)
        assert all(isinstance(size, int) and size > 0 for size in grid), (self.fn.__name__, grid)
        if compiles:
            args = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
            assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]

    with contextlib.ExitStack() as stack:
        if compiles:
            stack.callback(driver.set_active, driver._active)
            driver.set_active(Driver(10 * facts.major + facts.minor))
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for name, method in zip(_METHODS, (device.copy, device.get, device.set, device.nonzero), strict=True):
            stack.enter_context(mock.patch.object(torch.Tensor, name, _as_method(method)))
        stack.enter_context(device)
        yield device
