"""A GPU that only compiles: tensors on it know shape and dtype alone, and launching a kernel compiles it for the target.

For processes of their own that prepare kernels (see kernel_warmup): while it is there torch believes in a device, and what
the host reads off it are zeros. Tensors on the CPU stay real, so everything that plans steps and fills columns runs as ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from llmd.model.gpu_target import GpuTarget
from llmd.model.torch_import import finish_import

finish_import()  # tensors without memory need all of torch

from torch._subclasses import fake_tensor  # noqa: E402 - after finish_import
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

aten: Any = torch.ops.aten

_MEMORY_BYTES = 80 << 30
_READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default)
_COPIES = (aten._to_copy.default, aten.to.device, aten.to.dtype_layout)  # the latter two in inference mode
_PINNING = (aten.is_pinned.default, aten._pin_memory.default, aten.pin_memory.default)
Launch = Callable[..., Any]


class DryDevice(TorchDispatchMode):
    """What torch does on the device, without doing it."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        source = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        device = kwargs.get("device") or next((arg for arg in args if isinstance(arg, torch.device)), None)
        goes_there = device is not None and torch.device(device).type == "cuda"
        if source is None and not goes_there:
            return _on_host(func, args, kwargs)
        if source is not None and (func in _READS or (func in _COPIES and device is not None and not goes_there)):
            return _zeros_of(func, source, kwargs.get("dtype") or source.dtype)
        if source is None and func.name().startswith(("aten::_to_copy", "aten::to.")):
            with self._fakes:
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cuda")
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with self._fakes:
            found = func(*args, **kwargs)
        if func is aten.all.default:
            found.is_well = True
        return found

    def _fake(self, tensor: torch.Tensor) -> FakeTensor:
        """A tensor of the host among the arguments of a device's operation."""
        return tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor)

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Tensor's methods that look for a guard of the device before any mode sees them."""
        return {
            "copy_": self._copy, "contiguous": _contiguous, "__float__": _float, "__int__": _int, "__getitem__": self._get,
            "__setitem__": self._set,
        }  # fmt: skip

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
            return _PLAIN["copy_"](target, source, non_blocking)
        source.expand(target.shape)  # it must fit
        return target if isinstance(target, FakeTensor) else target.zero_()

    def _get(self, tensor: torch.Tensor, index: Any) -> torch.Tensor:
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((tensor, index))):
            return _PLAIN["__getitem__"](tensor, index)
        tensor, index = tree_map_only(torch.Tensor, self._fake, (tensor, index))
        with in_kernel_invocation_manager(self._fakes):
            found = _PLAIN["__getitem__"](tensor, index)
        return FakeTensor(self._fakes, found, torch.device("cuda:0"))

    def _set(self, tensor: torch.Tensor, index: Any, value: Any) -> None:
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((tensor, index, value))):
            _PLAIN["__setitem__"](tensor, index, value)


_GUARDED = ("copy_", "contiguous", "__float__", "__int__", "__getitem__", "__setitem__")
_PLAIN = {name: getattr(torch.Tensor, name) for name in _GUARDED}


def _contiguous(tensor: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    if not isinstance(tensor, FakeTensor):
        return _PLAIN["contiguous"](tensor, memory_format=memory_format)
    return tensor if tensor.is_contiguous(memory_format=memory_format) else tensor.clone(memory_format=memory_format)


def _float(tensor: torch.Tensor) -> float:
    return float(tensor.item()) if isinstance(tensor, FakeTensor) else _PLAIN["__float__"](tensor)


def _int(tensor: torch.Tensor) -> int:
    return int(tensor.item()) if isinstance(tensor, FakeTensor) else _PLAIN["__int__"](tensor)


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """There is no driver to pin memory with."""
    if func in _PINNING:
        return True if func is aten.is_pinned.default else args[0]
    return func(*args, **{**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs)


def _zeros_of(func: Any, source: torch.Tensor, dtype: torch.dtype) -> Any:
    """Whoever asks whether all of something is as it should be is told so."""
    if func not in _READS:
        return torch.zeros(source.shape, dtype=dtype)
    return torch.full((), getattr(source, "is_well", False), dtype=dtype).item()


class Pointer:
    """A kernel's argument in memory, as far as Triton looks at it: type, alignment, and how far it reaches."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.itemsize  # allocations are aligned
        self._range = int(tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        """The low bits are those of the real address."""
        return self._offset

    def ptr_range(self) -> int:
        """Bytes of the allocation."""
        return self._range


class _Driver:
    """Triton's, of a device that is compiled for."""

    def __init__(self, target: GpuTarget) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._device = object()  # a kernel keeps what it was compiled to by device: nothing of this one is any other's

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> object:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0


class _Nothing:
    """A stream, an event or a graph: whatever it is asked to do is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def elapsed_time(self, other: _Nothing) -> float:
        """Milliseconds."""
        return 1.0

    def query(self) -> bool:
        """Whether it is done."""
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _torch_cuda(target: GpuTarget) -> dict[str, Any]:
    """The functions of torch.cuda that say what the device is, or wait for it."""
    major, minor = target.capability
    facts = SimpleNamespace(
        name=target.name, major=major, minor=minor, multi_processor_count=target.num_processors, total_memory=_MEMORY_BYTES,
        gcnArchName=target.name, warp_size=target.warp_size,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_properties": facts,
        "get_device_capability": (major, minor), "get_device_name": target.name, "mem_get_info": (_MEMORY_BYTES,) * 2,
        "graph_pool_handle": (0, 1), "is_current_stream_capturing": False,
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"), 0),
        **dict.fromkeys(("_lazy_init", "init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"), None),
    }  # fmt: skip
    functions = {name: (lambda *_, answer=answer, **__: answer) for name, answer in answers.items()}
    kinds = ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "default_stream", "device")
    return {**functions, **dict.fromkeys(kinds, _Nothing)}


@contextlib.contextmanager
def dry_device(target: GpuTarget, launched: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """torch and Triton believe in one such device; `launched` is told the name of each kernel."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device, run, read = DryDevice(), JITFunction.run, JITFunction.parse
    alone = threading.Lock()  # Python 3.11 fails now and then where two threads build syntax trees at once

    def launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        launched(self.fn.__name__)
        pointers = [Pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return run(self, *pointers, grid=grid, warmup=True, **kwargs)

    def parse(self: Any) -> Any:
        with alone:
            return read(self)

    with contextlib.ExitStack() as stack:
        stack.callback(driver.set_active, driver._active)
        driver.set_active(_Driver(target))
        patches: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in _torch_cuda(target).items()]
        patches += [(torch.Tensor, name, _as_method(method)) for name, method in device.methods().items()]
        patches += [
            (torch.version, "hip", "0" if target.backend == "hip" else None),
            (fake_tensor, "init_gpu_context", lambda *_: None),
            (JITFunction, "run", launch),
            (JITFunction, "parse", parse),
        ]
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) comes by here, too
        stack.enter_context(device)
        yield


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)
