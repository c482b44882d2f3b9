"""Weights are streamed to a device through few buffers, in order and whole; what cannot be read is told with its name."""

import os
import threading
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.fake_cuda import fake_cuda
from safetensors.torch import save_file

from llmd.errors import ModelError
from llmd.model import device_stream
from llmd.model.device_stream import DeviceStream, TensorPlace, can_stream

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.bool)


def write(path, sizes, *, gap=0):
    """A file of random bytes, the places of tensors in it, and what they hold."""
    data = bytearray(os.urandom(sum(sizes) * 4 + gap * len(sizes) + 64))
    places, held, start = [], {}, 7
    for number, size in enumerate(sizes):
        dtype = DTYPES[number % len(DTYPES)]
        place = TensorPlace(f"t{number}", path, start, dtype, (size,))
        if dtype == torch.bool:
            data[place.start : place.end] = bytes(byte & 1 for byte in data[place.start : place.end])
        held[place.name] = torch.frombuffer(bytearray(data[place.start : place.end] or b"\0"), dtype=torch.uint8)
        start = place.end + gap
        places.append(place)
    path.write_bytes(data)
    return places, held


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(1, dtype=torch.uint8)


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    gap=st.sampled_from([0, 3, 1000]),
    chunk=st.sampled_from([16, 64, 4096]),
    threads=st.integers(1, 3),
)
def test_every_tensor_arrives_whole_and_in_order(tmp_path_factory, sizes, gap, chunk, threads):
    first, held = write(tmp_path_factory.mktemp("a") / "a", sizes, gap=gap)
    second, more = write(tmp_path_factory.mktemp("b") / "b", sizes[::-1])
    second = [place._replace(name=f"{place.name}b") for place in second]
    expected = held | {f"{name}b": value for name, value in more.items()}
    with DeviceStream(CPU, num_threads=threads, chunk_bytes=chunk) as stream:
        for _ in range(2):  # the ring serves again
            arrived = {name: tensor.clone() for name, tensor, _ in stream.read([*first, *second])}
            assert list(arrived) == [place.name for place in (*first, *second)]
            for place in (*first, *second):
                tensor = arrived[place.name]
                assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape)
                if tensor.numel():
                    assert torch.equal(as_bytes(tensor), expected[place.name])


def test_tensors_out_of_order_arrive_too(tmp_path):
    places, held = write(tmp_path / "a", [40, 50, 60])
    with DeviceStream(CPU, num_threads=2, chunk_bytes=32) as stream:
        for name, tensor, _ in stream.read(places[::-1]):
            assert torch.equal(as_bytes(tensor), held[name])


def test_what_the_host_holds_is_sent_in_chunks():
    source = torch.randn(13, 7).T
    with DeviceStream(CPU, num_threads=1, chunk_bytes=48) as stream:
        there = stream.send(source)
        assert torch.equal(there, source)
        source.zero_()
        assert there.abs().sum() > 0
        assert stream.send(torch.empty(0, 3)).shape == (0, 3)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    places, _ = write(tmp_path / "model.safetensors", [100, 100, 100])
    os.truncate(tmp_path / "model.safetensors", places[1].end - 3)
    arrived = []
    with (
        DeviceStream(CPU, num_threads=2, chunk_bytes=64) as stream,
        pytest.raises(ModelError, match=r"^model\.safetensors was cut while it was read: tensor t1 is not whole"),
    ):
        arrived += [name for name, *_ in stream.read(places)]
    assert arrived == []  # the list was never made, but the first tensor was whole:
    with DeviceStream(CPU, num_threads=2, chunk_bytes=1 << 20) as stream:
        assert next(stream.read(places))[0] == "t0"


def test_a_disk_that_fails(tmp_path, monkeypatch):
    places, _ = write(tmp_path / "model.safetensors", [100])

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(device_stream.os, "preadv", fail)
    with (
        DeviceStream(CPU, num_threads=1) as stream,
        pytest.raises(ModelError, match=r"model\.safetensors: tensor t0 cannot be read: .*Input/output error"),
    ):
        list(stream.read(places))


def test_who_stops_midway_leaves_nothing_behind(tmp_path):
    places, _ = write(tmp_path / "a", [1000] * 20)
    before = len(os.listdir("/proc/self/fd"))
    stream = DeviceStream(CPU, num_threads=2, chunk_bytes=64)
    reading = stream.read(places)
    next(reading)
    reading.close()
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llmd-read")]


def test_no_more_is_read_ahead_than_the_ring_holds(tmp_path, monkeypatch):
    places, _ = write(tmp_path / "a", [64] * 40)
    submitted: list[Future] = []
    with DeviceStream(CPU, num_threads=2, chunk_bytes=64) as stream:
        submit = stream._threads.submit
        monkeypatch.setattr(stream._threads, "submit", lambda *args: submitted.append(submit(*args)) or submitted[-1])
        reading = stream.read(places)
        next(reading)
        assert len(submitted) <= len(stream._buffers) + 5  # t0 itself has four chunks
        assert sum(buffer.numel() for buffer in stream._buffers) == 4 * 64
        reading.close()


def test_a_gpu_copies_from_pinned_buffers_alone_and_nobody_waits(tmp_path, monkeypatch):
    places, _ = write(tmp_path / "a", [5000, 3, 700])
    assert can_stream(torch.device("cuda"))
    assert not can_stream(CPU)
    marks, waits = [], []

    class Event:
        def record(self, stream):
            marks.append(stream)

        def synchronize(self):
            waits.append(threading.current_thread().name)

    with fake_cuda() as device:
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
        with DeviceStream(torch.device("cuda"), num_threads=1, chunk_bytes=512) as stream:
            found = list(stream.read(places))
            assert {name.startswith("llmd-read") for name in waits} == {True}
            assert stream.send(torch.ones(900)).device.type == "cuda"
        assert {tensor.device.type for _, tensor, _ in found} == {"cuda"}
        assert [tuple(tensor.shape) for _, tensor, _ in found] == [(5000,), (3,), (700,)]
        assert device.waits == []  # nothing from ordinary memory either
        assert len(device.copies_there) >= 10000 / 512
    assert set(marks) == {"the stream"}
    assert len(marks) > 20 + 3


def test_a_model_is_filled_without_a_copy_from_ordinary_memory(tmp_path):
    from model.tiny_models import make_model, save_model

    from llmd.api.v1.testing.driver import installed_parts
    from llmd.config import ModelConfig
    from llmd.model.loader import load_model, plan_model

    pytest.importorskip("triton")
    path, parts, reports = save_model(make_model("Qwen2"), tmp_path), installed_parts(), []
    with fake_cuda() as device:
        for load_format in ("auto", "dummy"):
            config = ModelConfig(model=str(path), device="cuda", dtype="bfloat16", load_format=load_format)
            blueprint = plan_model(config, path, parts, block_size=16, kv_cache_dtype="auto")
            device.clear()
            loaded = load_model(config, path, parts, blueprint, max_model_len=64, report=reports.append)
            assert {parameter.device.type for parameter in loaded.module.parameters()} == {"cuda"}
            others = ("(64, 20)", "(1048576,)")  # the rotary table, and what random weights are made of
            assert [wait for wait in device.waits if not any(shape in wait for shape in others)] == []
    assert reports[-1].fraction == pytest.approx(1.0)


def test_safetensors_files_tell_their_places(tmp_path):
    from llmd.model.layers import WeightSlot
    from llmd_plugins.checkpoints.safetensors_files import SafetensorsCheckpoint

    held = {f"t{number}": torch.randn(number + 1, 5).to(torch.bfloat16) for number in range(6)}
    save_file(held, tmp_path / "model.safetensors")
    wanted = {name: WeightSlot(name, tuple(tensor.shape), lambda _: None) for name, tensor in held.items() if name != "t3"}
    places = SafetensorsCheckpoint(tmp_path).places(wanted)
    assert [place.start for place in places] == sorted(place.start for place in places)
    with DeviceStream(CPU, num_threads=2) as stream:
        arrived = {name: tensor.clone() for name, tensor, _ in stream.read(places)}
    assert arrived.keys() == wanted.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in arrived.items())
