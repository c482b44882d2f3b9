"""A CUDA device that computes nothing, for whatever a benchmark does with one."""

import contextlib
from unittest import mock

import torch
from model.fake_cuda import fake_cuda


def on_device(tensor):
    """torch.tensor, which looks for a real device before any mode sees it."""

    def make(data, *, device=None, **kwargs):
        made = tensor(data, **kwargs)
        return made if device is None else made.to(torch.device(device))

    return make


def dense(contiguous):
    """torch.Tensor.contiguous, which looks for a real device too."""

    def make(tensor, **kwargs):
        if tensor.is_cuda and not tensor.is_contiguous():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return contiguous(tensor, **kwargs)

    return make


@contextlib.contextmanager
def fake_gpu():
    """What the host reads off it as a float is 1."""
    with (
        fake_cuda() as device,
        mock.patch.object(torch.Tensor, "__float__", return_value=1.0),
        mock.patch.object(torch, "tensor", on_device(torch.tensor)),
        mock.patch.object(torch.Tensor, "contiguous", dense(torch.Tensor.contiguous)),
        mock.patch.object(torch.cuda, "graph", return_value=contextlib.nullcontext()),
        torch.inference_mode(),
    ):
        yield device
