"""The C++ kernels of all ops, compiled once into the user's cache directory and called through ctypes.

Plain `g++` and raw pointers: half a second of compiling instead of torch's headers' twenty, no torch ABI, and ctypes
releases the GIL while a kernel runs. Without a compiler every op falls back to its torch path; the log says so once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("llmd.kernels")

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
)
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}  # as enum DType in common.h
KV_DTYPES = {**DTYPES, torch.int8: 2, torch.float8_e4m3fn: 3}  # what a KV cache may hold

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[type[ctypes._SimpleCData]]] = {
    "llmd_set_num_threads": [_I],
    "llmd_get_num_threads": [_P],
    "llmd_rms_norm": [_P, _P, _P, _P, _F, _I, _I, _I, _I, _I, _I],
    "llmd_silu_mul": [_P, _P, _I, _I, _I, _I],
    "llmd_rotary": [_P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I, _I, _I],
    "llmd_store_kv": [*[_P] * 7, *[_I] * 10],
    "llmd_rotary_store_kv": [*[_P] * 12, _F, *[_I] * 14],
    "llmd_paged_attention": [*[_P] * 12, _F, _F, *[_I] * 14],
    "llmd_int8_linear": [*[_P] * 8, *[_I] * 8],
    "llmd_int8_rows": [*[_P] * 4, *[_I] * 4],
    "llmd_linear": [_P, _P, _P, _P, _I, _I, _I, _I, _I, _I],
    "llmd_lora": [*[_P] * 9, *[_I] * 9],
    "llmd_grouped_linear": [*[_P] * 8, _F, *[_I] * 10],
    "llmd_fp8_linear": [*[_P] * 6, *[_I] * 8],
    "llmd_codebook_linear": [*[_P] * 6, *[_I] * 8],
    "llmd_experts": [*[_P] * 7, *[_I] * 5],
    "llmd_route": [_P, _P, _P, *[_I] * 6],
    "llmd_add_gated": [_P, _P, _P, _P, _I, _I, _I],
    "llmd_first_touch": [_P, _I],
    "llmd_quantize_channels": [*[_P] * 4, *[_I] * 3],
    "llmd_quantize_groups": [_P, _P, _P, *[_I] * 4],
    "llmd_pack_quads": [_P, _P, _I, _I],
    "llmd_replay": [_P, _I],
    "llmd_embedding": [_P, _P, _P, *[_I] * 5],
    "llmd_sample": [*[_P] * 7, *[_I] * 4],
    "llmd_read_pass": [_P, _I, _P],
    "llmd_pin_threads": [_P, _I, _P],
}


_NOT_REPLAYED = ("llmd_set_num_threads", "llmd_get_num_threads", "llmd_replay")


class Argument(ctypes.Union):
    """As union Argument in common.h."""

    _fields_ = (("pointer", _P), ("integer", _I), ("number", ctypes.c_double))


_FIELD = {_P: "pointer", _I: "integer", _F: "number"}
# an op, the address of its twin for a replay (0: none), its arguments, and what they were made of
Record = Callable[[str, int, "ctypes.Array[Argument]", tuple[Any, ...]], None]


class _Recorder:
    """The library to a thread that records: every call is made, and told with its arguments."""

    def __init__(self, lib: ctypes.CDLL, record: Record) -> None:
        self._lib, self._record = lib, record

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._lib, name)
        if name in _NOT_REPLAYED:
            return function
        twin = getattr(self._lib, f"{name}_replay", None)
        address = 0 if twin is None else ctypes.cast(twin, _P).value or 0

        def call(*arguments: Any) -> None:
            function(*arguments)
            kept = (Argument * len(arguments))()
            for slot, kind, value in zip(kept, _SIGNATURES[name], arguments, strict=True):
                setattr(slot, _FIELD[kind], ctypes.addressof(value) if isinstance(value, ctypes.Array) else value)
            self._record(name, address, kept, arguments)

        return call


class _Thread(threading.local):
    recorder: _Recorder | None = None


_thread = _Thread()


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built; the reason is logged once."""
    if _thread.recorder is not None:
        return _thread.recorder  # type: ignore[return-value]
    return _found[0] if _found else _find()


def record_to(record: Record | None) -> None:
    """Tell this thread's calls to `record` as they are made, until None is given. Without kernels there are none."""
    _thread.recorder = None
    lib = library()
    if record is not None and lib is not None:
        _thread.recorder = _Recorder(lib, record)


def set_num_threads(count: int) -> None:
    """How many threads the kernels use that the calling thread launches; torch's own are set by torch."""
    if (lib := library()) is not None:
        lib.llmd_set_num_threads(count)


def num_threads() -> int:
    """How many threads the kernels use that the calling thread launches."""
    count = ctypes.c_int64(1)
    if (lib := library()) is not None:
        lib.llmd_get_num_threads(ctypes.addressof(count))
    return count.value


def is_available(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can work on this tensor: on the CPU, of a dtype they know."""
    return x.is_cpu and x.dtype in DTYPES and library() is not None


_found: list[ctypes.CDLL | None] = []
_lock = threading.Lock()


def _find() -> ctypes.CDLL | None:
    with _lock:
        if not _found:
            _found.append(_load())
        return _found[0]


def _load() -> ctypes.CDLL | None:
    try:
        lib = _open(_build())
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        log.warning("no native CPU kernels, plain torch is used instead: %s", detail.strip()[-500:])
        return None
    return lib


def _open(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


def _build() -> Path:
    """Compile the sources unless the cache holds this very build; its path."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise OSError("no C++ compiler (g++) was found")
    openmp = _share_openmp()
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.h")), *sorted(folder.glob("*/cpu.cpp"))]
    path = _cache_folder() / f"llmd_kernels-{_digest(sources, compiler, openmp)}.so"
    if not _is_ours(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(compiler, sources, path, openmp)
    return path


def _compile(compiler: str, sources: list[Path], path: Path, openmp: bool) -> None:
    """Build into a scratch folder beside the target, then rename: another process never sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = []
        jobs = []
        for index, source in enumerate(source for source in sources if source.suffix == ".cpp"):
            objects.append(f"{scratch}/{index}.o")
            command = [compiler, *_flags(), f"-I{sources[0].parent}", "-c", str(source), "-o", objects[-1]]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        errors = [job.communicate(timeout=300)[1] for job in jobs]
        for job, error in zip(jobs, errors, strict=True):
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, compiler, stderr=error)
        # With torch's OpenMP runtime already in the process its symbols are left open: two runtimes would fight for cores.
        link = [compiler, "-shared", *objects, "-o", f"{scratch}/out.so", *([] if openmp else ["-fopenmp"])]
        subprocess.run(link, check=True, capture_output=True, text=True, timeout=300)
        os.replace(f"{scratch}/out.so", path)


def _flags() -> tuple[str, ...]:
    """FLAGS, and behind them those of LLMD_KERNEL_FLAGS: the last one counts, so -march=x86-64-v3 builds for older CPUs."""
    return (*FLAGS, *os.environ.get("LLMD_KERNEL_FLAGS", "").split())


def _share_openmp() -> bool:
    """Make the symbols of the OpenMP runtime that torch brought visible to our library; False where there is none."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "libgomp" in line or "libiomp5" in line}
    for path in sorted(paths):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return bool(paths)


def _cache_folder() -> Path:
    if folder := os.environ.get("LLMD_CACHE_DIR"):
        return Path(folder) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmd" / "kernels"


def _is_ours(path: Path) -> bool:
    """A cached build counts only if this user wrote it and nobody else can."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.geteuid() and not stat.st_mode & 0o022


def _digest(sources: list[Path], compiler: str, openmp: bool) -> str:
    """Names a build: sources, flags, compiler and the CPU that -march=native saw.

    A cache folder may be shared between machines, and a hypervisor or a container may mask what a CPU can do: so the name
    holds what the compiler itself makes of the flags here, the macros of every instruction set that it would use.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    ask = [compiler, *_flags(), "-dM", "-E", "-x", "c++", os.devnull]
    target = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout
    digest = hashlib.sha256(repr((_flags(), version, target, openmp, _cpu())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags", "Features", "CPU part")))
