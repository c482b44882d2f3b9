"""The measured memory bandwidth."""

import torch

from llmd.model import bandwidth

CPU = torch.device("cpu")


def test_a_copy_is_measured():
    found = bandwidth.memory_bandwidth(CPU, 4 << 20, 3)
    assert 1e7 < found < 1e13


def test_without_room_it_is_unknown(monkeypatch):
    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bandwidth.torch, "ones", no_room)
    assert bandwidth.memory_bandwidth(CPU) is None
