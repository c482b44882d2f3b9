"""A recorded piece of work gives the same again, from what its inputs hold then; what cannot come again is named."""

import gc

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.linear import linear
from llmd_kernels.replay import Pool, Recording
from llmd_kernels.rms_norm import add_rms_norm, rms_norm
from llmd_kernels.silu_mul import silu_mul

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")

HIDDEN, INNER = 96, 160


class Block:
    """A few layers of an MLP with everything that a recording meets: new tensors, views, work in place."""

    def __init__(self, depth=3):
        torch.manual_seed(0)
        self.up = [torch.randn(2 * INNER, HIDDEN).bfloat16() / 8 for _ in range(depth)]
        self.down = [torch.randn(HIDDEN, INNER).bfloat16() / 8 for _ in range(depth)]
        self.norm = torch.rand(HIDDEN).bfloat16()

    def __call__(self, x):
        y, residual = rms_norm(x, self.norm, 1e-6), rms_norm(x, self.norm, 1e-5)
        for up, down in zip(self.up, self.down, strict=True):
            y = linear(silu_mul(linear(y, up)), down)
            y, residual = add_rms_norm(y, residual, self.norm, 1e-6)
        return linear(y[:, : HIDDEN // 2], self.norm.view(1, -1)[:, : HIDDEN // 2], out_dtype=torch.float32)


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request):
    before = native.num_threads()
    native.set_num_threads(request.param)
    yield
    native.set_num_threads(before)


def rows(count):
    return torch.randn(count, HIDDEN).bfloat16()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_same_from_new_inputs(count, threads):
    block, x = Block(), rows(count)
    with Recording(Pool()) as recording:
        y = block(x)
    assert not recording.missed
    assert recording.num_calls == 2 + 3 * 4 + 1
    for _ in range(3):
        x.copy_(rows(count))
        expected = block(x)
        recording.replay()
        assert torch.equal(y, expected)


def test_recordings_share_memory_and_do_not_disturb_each_other():
    block, pool, recordings = Block(), Pool(), []
    for count in (16, 3, 9):
        x = rows(count)
        with Recording(pool) as recording:
            recordings.append((recording, x, block(x)))
    taken = pool.num_bytes
    for recording, x, y in 2 * recordings:
        x.copy_(rows(len(x)))
        expected = block(x)
        recording.replay()
        assert torch.equal(y, expected)
    for recording, *_ in recordings:
        recording.replay()
    assert pool.num_bytes == taken


def test_memory_of_dead_tensors_is_used_again():
    shallow, deep = Pool(), Pool()
    for pool, depth in ((shallow, 2), (deep, 12)):
        with Recording(pool):
            Block(depth)(rows(8))
    gc.collect()
    assert deep.num_bytes == shallow.num_bytes


def test_what_torch_computes_is_named_and_refused():
    x = rows(2)
    with Recording(Pool()) as recording:
        y = rms_norm(x, torch.ones(HIDDEN).bfloat16(), 1e-6) + 1
    assert y.shape == x.shape
    assert "aten.add.Tensor" in recording.missed
    with pytest.raises(ValueError, match=r"aten\.add\.Tensor"):
        recording.replay()


@pytest.mark.parametrize("read", [lambda x: x[0].item(), lambda x: bool((x > 0).any())])
def test_a_look_at_values_is_named(read):
    x = torch.ones(3)
    with Recording(Pool()) as recording:
        read(x)
    assert recording.missed


def test_only_the_recording_thread_is_recorded():
    import threading

    x, done = rows(1), []
    with Recording(Pool()) as recording:
        other = threading.Thread(target=lambda: done.append(rms_norm(x, torch.ones(HIDDEN).bfloat16(), 1e-6)))
        other.start()
        other.join()
    assert len(done) == 1
    assert recording.num_calls == 0


def test_recording_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), Recording(Pool()) as recording:
        raise ZeroDivisionError
    rms_norm(rows(1), torch.ones(HIDDEN).bfloat16(), 1e-6)
    assert recording.num_calls == 0


def test_every_op_of_a_step_can_be_replayed():
    lib = native._found[0]
    assert lib is not None
    without = {name for name in native._SIGNATURES if not hasattr(lib, f"{name}_replay")}
    assert not {
        name for name in without if name.endswith(("linear", "attention", "norm", "mul", "kv", "embedding", "sample"))
    }
    assert without >= set(native._NOT_REPLAYED)


def test_an_op_without_a_twin_is_named():
    with Recording(Pool()) as recording:
        recording._add("llmd_other", 0, None, ())
    assert recording.missed == {"llmd_other": 1}


def test_what_an_unusable_recording_made_is_left_to_whoever_keeps_it():
    pool = Pool()
    with Recording(pool) as first:
        kept = torch.empty(64).fill_(1)
    assert first.missed
    with Recording(pool):
        other = torch.empty(64)
    assert other.data_ptr() != kept.data_ptr()
    other.zero_()
    assert kept.sum() == 64
