"""Memory for weights: huge pages where there are some, plain memory where not, and the same numbers either way."""

import mmap
import os
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd.errors import ModelError
from llmd.model import huge_pages, weight_memory
from llmd.model.huge_pages import HUGE_PAGE, map_huge, prepare, take_prepared
from llmd.model.weight_memory import MappedFile, WeightMemory, copy_into, scratch

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for huge pages")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=12), st.sampled_from(["a", "b"]))
def test_tensors_lie_apart_and_hold_what_is_put_there(shapes, kind):
    memory, dtype = WeightMemory(), {"a": torch.bfloat16, "b": torch.int8}[kind]
    tensors = [memory.empty(shape, dtype) for shape in shapes]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
        assert tensor.data_ptr() % 64 == 0
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(tensors))
    memory.close()
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(tensors))


@needs_linux
def test_a_chunk_begins_on_a_huge_page_and_asks_for_them(monkeypatch):
    asked = []
    real = mmap.mmap

    class Watched(real):
        def madvise(self, option, *range_):
            asked.append(option)
            return super().madvise(option, *range_)

    monkeypatch.setattr(huge_pages.mmap, "mmap", Watched)
    assert WeightMemory().empty((3 << 20,), torch.uint8).data_ptr() % HUGE_PAGE == 0
    assert asked == [mmap.MADV_HUGEPAGE]


@needs_linux
def test_a_kernel_without_huge_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Refusing)
    assert WeightMemory().empty((5, 7), torch.float32).fill_(2).sum() == 70


def test_a_system_without_huge_pages(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = WeightMemory()
    tensor = memory.empty((5, 7), torch.float32).fill_(2)
    large = torch.ones(2048)
    memory.adopt(large)
    assert (tensor.sum(), large.sum(), scratch((8 << 20,), torch.uint8).numel()) == (70, 2048, 8 << 20)
    memory.close()


@needs_linux
def test_no_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes of weights"):
        map_huge(1 << 62)


def test_adopted_tensors_move_and_all_who_hold_them_go_along():
    memory = WeightMemory()
    parameter = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    holder, wanted, old = [parameter], parameter.clone(), parameter.data_ptr()
    turned = torch.randn(64, 64).T
    expected = turned.clone()
    with torch.inference_mode():
        memory.adopt(parameter)
        memory.adopt(turned.contiguous())
    assert torch.equal(holder[0], wanted)
    assert torch.equal(turned, expected)
    assert (parameter.data_ptr() != old) == (sys.platform == "linux")
    here = parameter.data_ptr()
    memory.adopt(parameter)
    assert parameter.data_ptr() == here


def test_small_tensors_and_views_stay():
    memory, whole, small = WeightMemory(), torch.randn(128, 64), torch.randn(8)
    places = whole[:100].data_ptr(), small.data_ptr()
    memory.adopt(whole[:100])
    memory.adopt(small)
    assert (whole.data_ptr(), small.data_ptr()) == places


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(torch.randn(3 << 20).view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("size", [10, 4096, 100_000, 3 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_copies_out_of_a_file_are_its_bytes(file, size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with MappedFile(file) as mapped:
            source = mapped.tensor(torch.float32, (size,), 0)
            target = torch.empty(size)
            copy_into(target, source)
            cast = torch.empty(size, dtype=torch.bfloat16)
            copy_into(cast, source)
            turned = torch.empty(size // 2, 2).T
            copy_into(turned, source[: size // 2 * 2].view(2, -1))
            mapped.give_back(0, 4 * size)
            del source
    finally:
        torch.set_num_threads(before)
    wanted = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)[:size]
    assert torch.equal(target, wanted)
    assert torch.equal(cast, wanted.bfloat16())
    assert torch.equal(turned, wanted[: size // 2 * 2].view(2, -1))


def test_a_file_that_is_cut_while_it_is_read(file):
    with MappedFile(file) as mapped:
        os.truncate(file, 1 << 20)
        with pytest.raises(ModelError, match="weights was cut while it was read"):
            copy_into(torch.empty(3 << 20), mapped.tensor(torch.float32, (3 << 20,), 0))


@given(st.integers(1, 1 << 34), st.integers(1, 64))
def test_parts_cover_everything_once(size, most):
    parts = list(weight_memory._parts(size, most))
    assert len(parts) <= most
    assert parts[0].start == 0
    assert parts[-1].stop == size
    assert all(left.stop == right.start for left, right in pairwise(parts))


@needs_linux
def test_what_was_made_ready_is_used_and_the_rest_goes_back(monkeypatch):
    monkeypatch.setattr(huge_pages, "free_memory", lambda: 1 << 40)
    prepare(8 << 20)
    prepare(64 << 20)  # one at a time
    memory = WeightMemory()
    assert take_prepared() is None
    tensor = memory.empty((1 << 20,), torch.uint8).fill_(7)
    memory.close()
    assert int(tensor.sum()) == 7 << 20


def test_little_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(huge_pages, "free_memory", lambda: 5 << 30)
    prepare(1 << 30)
    assert take_prepared() is None
