"""Which errors say that memory was lacking: such a step is computed again, smaller, and nothing has broken.

Not all of them are torch.OutOfMemoryError. That one comes from torch's allocator only; what libraries and drivers take
beside it (kernels as they load, graphs as they are instantiated, workspaces, pinned host memory) fails with RuntimeErrors of
which only the words tell. The device works on after each of them.
"""

from __future__ import annotations

import torch

_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",  # cudaErrorMemoryAllocation, whoever called the driver
    "HIP error: out of memory",  # hipErrorOutOfMemory
    "Triton Error [CUDA]: out of memory",  # a kernel's module did not load
    "Triton Error [HIP]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_MAX_DEPTH = 8  # of errors that were raised from others


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, the device's or this machine's: the error itself, or one that it was raised from."""
    cause: BaseException | None = error
    for _ in range(_MAX_DEPTH):
        if cause is None:
            return False
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in _WORDS):
            return True
        cause = cause.__cause__
    return False
