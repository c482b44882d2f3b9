"""States of rows: their pool, and recurrences over any cut of any rows against a loop over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd.api.v1.testing import PagedRows
from llmd.config import CacheConfig
from llmd.errors import ModelError
from llmd.model.kv_tensors import Sizes
from llmd.model.layers.recurrence import linear_recurrence, short_convolution
from llmd.model.states import RowState, StateShape, StateTensors, check_shape, room_beside, row_bytes, without_blocks

CPU = torch.device("cpu")
SIZE, WIDTH = 3, 4


def test_a_row_lies_together_and_begins_at_zero():
    shapes = [StateShape((3, 5), torch.bfloat16), StateShape((7,), torch.float32)]
    states = StateTensors(shapes, 4, CPU)
    assert states.num_bytes == 4 * row_bytes(shapes) == 4 * (64 + 64)
    assert [tuple(tensor.shape) for tensor in states.tensors] == [(4, 3, 5), (4, 7)]
    for tensor in states.tensors:
        tensor.fill_(float("nan"))
    states.begin(2)
    for tensor in states.tensors:
        assert not tensor[2].any()
        assert tensor[[0, 1, 3]].isnan().all()
    states.release()
    assert states.tensors == ()
    states.begin(0)  # nothing is there
    states.refill()
    assert not any(tensor.any() for tensor in states.tensors)


def test_a_model_without_states_has_no_pool():
    states = StateTensors((), 256, CPU)
    states.begin(3)
    assert (states.tensors, states.num_bytes) == ((), 0)


@pytest.mark.parametrize("shape", [(), (0,), (4, -1), (1.5,), (1 << 20, 1 << 20)])
def test_shapes_that_cannot_be_kept(shape):
    with pytest.raises(ModelError, match="a state"):
        check_shape(shape, torch.float32)


def test_states_that_do_not_fit_are_told_with_what_helps():
    shapes = [StateShape((256,), torch.float32)]
    assert room_beside(10_000, shapes, 4) == 10_000 - 4 * 1024
    with pytest.raises(ModelError, match=r"states of 16 rows take 16\.00 KiB .*lower max_num_seqs"):
        room_beside(10_000, shapes, 16)


def test_without_attention_a_sequence_has_one_block():
    cache, sizes = without_blocks(CacheConfig(), Sizes(0, 500), 8)
    assert (cache.block_size, sizes) == (500, Sizes(16, 500))


class Model:
    """Two states over rows that are scattered, and what a loop over tokens says."""

    def __init__(self, lengths, seed):
        torch.manual_seed(seed)
        self.lengths = lengths
        self.rows = PagedRows(lengths, seed=seed)
        self.states = StateTensors(
            [StateShape((SIZE,), torch.float32), StateShape((WIDTH - 1, SIZE), torch.float32)], len(lengths) + 2, CPU
        )
        self.sums, self.inputs = (RowState(i, s.shape, s.dtype) for i, s in enumerate(self.states._shapes))
        for tensor in self.states.tensors:
            tensor.fill_(float("nan"))
        for row in self.rows.rows.tolist():
            self.states.begin(row)
        self.decay = [torch.rand(length, SIZE) for length in lengths]
        self.x = [torch.randn(length, SIZE) for length in lengths]
        self.weight, self.bias = torch.randn(SIZE, WIDTH), torch.randn(SIZE)

    def step(self, starts, counts, only):
        batch = replace(self.rows.batch(starts, counts, only), states=self.states.tensors)
        decay, x = (torch.cat([parts[i][starts[i] : starts[i] + counts[i]] for i in only]) for parts in (self.decay, self.x))
        mixed = short_convolution(x, self.weight, self.bias, self.inputs, batch)
        return linear_recurrence(decay, mixed, self.sums, batch).split([counts[i] for i in only])

    def expected(self, row):
        padded = torch.cat((torch.zeros(WIDTH - 1, SIZE), self.x[row]))
        h, found = torch.zeros(SIZE), []
        for t in range(self.lengths[row]):
            mixed = self.bias + (self.weight.T * padded[t : t + WIDTH]).sum(0)
            h = self.decay[row][t] * h + mixed
            found.append(h)
        return torch.stack(found)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 21), min_size=1, max_size=5), seed=st.integers(0, 99), data=st.data())
def test_any_cut_gives_what_a_loop_over_tokens_gives(lengths, seed, data):
    model = Model(lengths, seed)
    done, found = [0] * len(lengths), [[] for _ in lengths]
    while left := [i for i, length in enumerate(lengths) if done[i] < length]:
        only = data.draw(st.permutations(left)).copy()[: data.draw(st.integers(1, len(left)))]
        counts = [data.draw(st.sampled_from([1, 1, 2, 3, 7, 30])) for _ in lengths]
        counts = [min(count, length - start) for count, length, start in zip(counts, lengths, done, strict=True)]
        for i, part in zip(only, model.step(done, counts, only), strict=True):
            found[i].append(part)
            done[i] += counts[i]
    for row, parts in enumerate(found):
        torch.testing.assert_close(torch.cat(parts), model.expected(row), rtol=1e-4, atol=1e-4)


def test_numbers_of_one_row_that_are_not_finite_stay_in_it():
    model = Model([9, 9], 0)
    model.x[0][4] = float("nan")
    one, other = model.step([0, 0], [9, 9], [0, 1])
    assert one[4:].isnan().all()
    torch.testing.assert_close(other, model.expected(1), rtol=1e-4, atol=1e-4)


def test_a_state_of_matrices_decays_by_its_rows():
    """As in gated linear attention: h [D, E] += k ⊗ v, the decay [D, 1] broadcast."""
    rows = PagedRows([5])
    states = StateTensors([StateShape((2, 3), torch.float32)], 3, CPU)
    state, batch = RowState(0, (2, 3), torch.float32), replace(rows.batch([0], [5]), states=states.tensors)
    decay, values = torch.rand(5, 2, 1), torch.randn(5, 2, 3)
    found, h = linear_recurrence(decay, values, state, batch), torch.zeros(2, 3)
    for t in range(5):
        h = decay[t] * h + values[t]
        torch.testing.assert_close(found[t], h)
    torch.testing.assert_close(state.read(batch)[0], h)
