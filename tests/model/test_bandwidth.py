"""The measured memory bandwidth: of a CPU by reading, in slices."""

import logging

import pytest
import torch
from engine.test_roofline import info_of

from llmd.model import bandwidth
from llmd.model.bandwidth import ReadProbe, memory_bandwidth, tell_roofline
from llmd_kernels import native

CPU = torch.device("cpu")
MIB = 1 << 20


def test_a_pass_over_memory_is_measured():
    assert 1e7 < memory_bandwidth(CPU, 8 * MIB) < 1e13


def test_without_a_compiler_torch_reads(monkeypatch):
    monkeypatch.setattr(native, "_found", [None])
    assert 1e7 < memory_bandwidth(CPU, 8 * MIB) < 1e13


def test_copies_are_measured_where_they_are_fast():
    assert 1e7 < bandwidth._copy_bandwidth(CPU, 4 * MIB, 3) < 1e13


def test_a_probe_works_in_slices():
    probe, slices = ReadProbe(96 * MIB), 1
    while not probe.advance():
        slices += 1
        assert probe.bandwidth is None
    assert 3 + 1 <= slices <= 3 + 8
    assert probe.bandwidth > 0


def test_without_room_it_is_unknown(monkeypatch):
    monkeypatch.setattr(bandwidth, "free_memory", lambda: 200 * MIB)
    assert memory_bandwidth(CPU) is None

    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bandwidth.torch, "ones", no_room)
    assert bandwidth._copy_bandwidth(CPU, 1, 1) is None


@pytest.mark.parametrize(
    ("free", "cache", "expected"), [(24 << 10, 32, 256), (24 << 10, 96, 384), (640, 32, 160), (1 << 20, 512, 1024)]
)
def test_the_buffer_is_larger_than_the_caches_and_a_part_of_what_is_free(monkeypatch, free, cache, expected):
    monkeypatch.setattr(bandwidth, "free_memory", lambda: free * MIB)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda: cache * MIB)
    assert bandwidth._buffer_bytes() == expected * MIB


def test_the_roofline_is_told(caplog):
    info = info_of(weights_bytes=10**9, num_blocks=100, kv_bytes=100 * 4 * 12_000, facts={"weight_bits": 16.0})
    with caplog.at_level(logging.INFO, "llmd.model"):
        tell_roofline(info, 30e9, 2)
    assert info.facts["memory_bandwidth"] == 30e9
    assert caplog.messages == [
        "memory is read at 30.0 GB/s by 2 threads; a step reads 1000.0 MB of weights and 12.0 KB a token of context: at "
        "most 29.6 tok/s for one sequence of 1024 tokens, likely 26.7 (90 %, as was seen with weights of 16 bits)"
    ]


def test_an_encoder_has_a_bandwidth_and_no_rate(caplog):
    info = info_of(kv_bytes=0, kv_groups=())
    with caplog.at_level(logging.INFO, "llmd.model"):
        tell_roofline(info, 30e9, 1)
    assert info.facts["memory_bandwidth"] == 30e9
    assert caplog.messages == []
