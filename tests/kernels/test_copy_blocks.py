"""copy_blocks against plain indexing, in every dtype a pool may have; its Triton kernel without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_triton import run_script

from llmd_kernels.copy_blocks import as_words, copy_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int8)
CASES = {
    "a block of several parts": ((7, 3, 2, 16, 2, 64), torch.bfloat16, 3),
    "an even number": ((9, 2, 2, 4, 2, 16), torch.float32, 4),
    "scales between": ((6, 2, 2, 5 * 16), torch.uint8, 2),
    "e4m3": ((4, 2, 8), torch.float8_e4m3fn, 1),
    "of odd size": ((5, 3, 7), torch.float16, 2),
    "of odd bytes": ((5, 3, 7), torch.int8, 2),
    "none": ((5, 8), torch.float32, 0),
}


def made(shape, dtype):
    """A pool in which no two blocks are alike."""
    generator = torch.Generator().manual_seed(0)
    num_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def chosen(num_blocks, count):
    """Sources, which may repeat, and targets that are none of them."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(count))
    sources, targets = order[count:], order[:count]
    return sources[torch.arange(count) % max(1, len(sources))], targets.contiguous()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_targets_become_their_sources_and_nothing_else_changes(case):
    shape, dtype, count = case
    pool, before = made(shape, dtype), as_words(made(shape, dtype))
    sources, targets = chosen(shape[0], count)
    copy_blocks(pool, sources, targets)
    expected = before.clone()
    expected[targets] = before[sources]
    assert torch.equal(as_words(pool), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pool_and_any_choice(data):
    num_blocks = data.draw(st.integers(2, 9))
    dims = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    targets = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True, max_size=num_blocks - 1))
    others = [block for block in range(num_blocks) if block not in targets]
    sources = [data.draw(st.sampled_from(others)) for _ in targets]
    pool = made((num_blocks, *dims), dtype)
    before = pool.clone()
    copy_blocks(pool, torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))
    came_from = dict(zip(targets, sources, strict=True))
    for block in range(num_blocks):
        assert torch.equal(as_words(pool)[block], as_words(before)[came_from.get(block, block)])


def test_a_word_is_as_wide_as_a_block_allows():
    shapes = {torch.int64: (3, 2, 4), torch.int32: (3, 2, 3), torch.int16: (3, 1, 3)}
    for word, shape in shapes.items():
        assert as_words(torch.zeros(shape, dtype=torch.bfloat16)).dtype == word
    assert as_words(torch.zeros(3, 5, dtype=torch.uint8)).dtype == torch.int8


POOL, IDS = torch.zeros(4, 2, 8), torch.tensor([0])


@pytest.mark.parametrize(
    ("pool", "sources", "targets", "words"),
    [
        (torch.zeros(4), IDS, IDS + 1, r"a contiguous pool \[num_blocks, ...\], got \[4\]"),
        (torch.zeros(2, 8, 4).transpose(0, 1), IDS, IDS + 1, "a contiguous pool"),
        (POOL, IDS, torch.tensor([1, 2]), r"as many sources as targets, got \[1\], \[2\]"),
        (POOL, IDS[None], IDS[None], "as many sources as targets"),
        (POOL, IDS.int(), IDS + 1, r"int64 sources on cpu, got torch\.int32"),
        (POOL, IDS, (IDS + 1).to("meta"), r"int64 targets on cpu, got torch\.int64 on meta"),
        (POOL, torch.arange(4)[::2], torch.tensor([1, 3]), "contiguous int64 sources"),
        (torch.empty(2, 1 << 30, device="meta"), IDS.to("meta"), IDS.to("meta"), "blocks of up to 536870912 bytes"),
    ],
)
def test_what_it_does_not_serve_is_told(pool, sources, targets, words):
    with pytest.raises(ValueError, match=words):
        copy_blocks(pool, sources, targets)


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_outside_the_pool_is_told_on_a_cpu(block):
    with pytest.raises(IndexError):
        copy_blocks(POOL.clone(), torch.tensor([block]), IDS)


def test_in_the_interpreter_it_copies_the_same():
    found = run_script("copy_blocks_interpreted.py", TRITON_INTERPRET="1")
    assert found == dict.fromkeys(CASES, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu(case):
    shape, dtype, count = case
    pool, expected = made(shape, dtype).cuda(), made(shape, dtype)
    sources, targets = chosen(shape[0], count)
    copy_blocks(expected, sources, targets)
    copy_blocks(pool, sources.cuda(), targets.cuda())
    assert torch.equal(as_words(pool.cpu()), as_words(expected))


def test_it_compiles_for_gpus_and_moves_16_bytes_at_a_time():
    found = run_script("copy_blocks_compiled.py", TRITON_INTERPRET="0")
    assert len(found["trouble"]) == 9
    assert not {name: trouble for name, trouble in found["trouble"].items() if trouble}
    assert found["widths"] == {"sm_80": 128, "sm_90": 128}
