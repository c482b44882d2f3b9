"""The pool beside neighbours: what the share allows, what is free now, and what both are told with."""

import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.fake_gpu_memory import GIB, MIB, fake_gpu_memory

from llmd.config import CacheConfig, SchedulerConfig
from llmd.errors import ModelError
from llmd.model import kv_tensors, sizing
from llmd.model.blueprint import Blueprint
from llmd.model.device_memory import device_memory, peak_bytes
from llmd.model.estimates import activation_bytes, graph_bytes, sampling_bytes
from llmd.model.kv_tensors import NoRoom
from llmd.model.memory_room import HostMemory
from llmd.model.sizing import PoolSizing
from llmd.model.states import StateShape

GPU = torch.device("cuda:0")
SCHEDULER = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=1000)
WEIGHTS, STEP, GRAPHS = 10 * GIB, GIB, GIB // 8
BLOCK = 2 * MIB


def blueprint(device=GPU, **changes):
    """A block of 16 tokens takes 2 MiB."""
    config = SimpleNamespace(
        context_length=32768, rope=SimpleNamespace(kind="default"), num_kv_heads=8, head_dim=128, num_heads=32,
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32,
    )  # fmt: skip
    backend = SimpleNamespace(kv_shape=lambda block_size, heads, dim: (2, block_size, heads, dim))
    return Blueprint(config, torch.bfloat16, device, backend, "fake", **{"num_kv_layers": 32, **changes})


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No model of another test is a neighbour."""
    monkeypatch.setattr(sizing, "_neighbours", weakref.WeakSet())


class Model:
    """Loads, as the runner does."""

    def __init__(
        self, memory, *, wanted=None, weights=WEIGHTS, graphs=GRAPHS, step=STEP, outside=0, wasted=0, states=(), **cache
    ):
        self.memory, self.weights = memory, weights
        self.sizing = PoolSizing(CacheConfig(**cache), SCHEDULER, blueprint(states=tuple(states)), wanted)
        self.early = self.sizing.before_weights(0)
        memory.take(weights)
        profile_pool = self.sizing.num_profile_blocks * self.sizing.block_bytes

        def largest_step():
            memory.take(profile_pool)
            memory.take(step, wasted)
            memory.others += outside
            memory.give(profile_pool + step)

        self.peak = peak_bytes(GPU, largest_step)
        self.graphs = graphs

    def place(self):
        sizes = self.sizing.beside(self.peak, graph_bytes=self.graphs)
        return self.sizing.settle(sizes, self.allocate)

    def allocate(self, sizes):
        try:
            self.memory.take(sizes.num_blocks * self.sizing.block_bytes)
        except torch.OutOfMemoryError as error:
            raise NoRoom("no room") from error


def test_alone_the_share_counts():
    with fake_gpu_memory(80 * GIB, others=GIB // 2) as memory:
        model = Model(memory, outside=100 * MIB)
        sizes = model.place()
        room = 72 * GIB - WEIGHTS - STEP - GRAPHS - 100 * MIB
        assert sizes == (room // BLOCK, 32768)
        account = model.sizing.account(weights_bytes=WEIGHTS)
        assert account.activation_bytes == STEP  # the pool of the profile is not among it
        assert account.pool_bytes == sizes.num_blocks * BLOCK
        assert account.taken_bytes <= account.limit_bytes == 72 * GIB
        assert account.missing_bytes == 0
        assert {row.name: row.note for row in account.rows()}["KV pool"].endswith("what the share leaves")


def test_two_processes_of_half_lie_beside_each_other():
    """As with vLLM: the share is one's own, whatever others have."""
    with fake_gpu_memory(80 * GIB, others=36 * GIB) as memory:
        sizes = Model(memory, gpu_memory_utilization=0.45).place()
        assert sizes.num_blocks == (36 * GIB - WEIGHTS - STEP - GRAPHS) // BLOCK


def test_beside_a_large_neighbour_what_is_free_counts():
    with fake_gpu_memory(80 * GIB, others=50 * GIB) as memory:
        model = Model(memory)
        sizes = model.place()
        room = 30 * GIB - WEIGHTS - STEP - GRAPHS - 80 * GIB // 100
        assert sizes.num_blocks == room // BLOCK
        rows = {row.name: row for row in model.sizing.account(weights_bytes=WEIGHTS).rows()}
        assert rows["KV pool"].note.endswith("what is free leaves")
        assert rows["others"].value == 50 * GIB
        memory.take(STEP)  # and the next step finds its memory


def test_a_step_in_which_all_rows_sample_has_room():
    """Though the one that was measured had a single row."""
    most = sampling_bytes(SCHEDULER, blueprint())
    with fake_gpu_memory(80 * GIB) as memory:
        model = Model(memory, step=MIB)
        assert model.place().num_blocks == (72 * GIB - WEIGHTS - most - GRAPHS) // BLOCK
        assert model.sizing.account(weights_bytes=WEIGHTS).activation_bytes == most


def test_fragments_are_kept_free():
    with fake_gpu_memory(80 * GIB, others=50 * GIB) as memory:
        model = Model(memory, wasted=3 * GIB)
        assert model.place().num_blocks == (30 * GIB - WEIGHTS - STEP - GRAPHS - 3 * GIB) // BLOCK


def test_a_neighbour_that_came_between_profile_and_pool(caplog):
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory)
        memory.others += 40 * GIB
        with caplog.at_level(logging.WARNING):
            sizes = model.place()
        assert "others took 40.00 GiB of cuda:0 since the largest step was measured" in caplog.text
        assert sizes.num_blocks == (39 * GIB - WEIGHTS - STEP - GRAPHS - 80 * GIB // 100) // BLOCK


def test_a_neighbour_that_came_while_graphs_were_recorded(caplog):
    """What was seen of two stands for all: its gigabytes must not be taken for theirs."""
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory, graphs=300 * GIB)
        with caplog.at_level(logging.WARNING):
            sizes = model.place()
        taken = model.sizing.account(weights_bytes=WEIGHTS).graph_bytes
        assert taken == 4 * graph_bytes((1, 2, 4, 8), blueprint())
        assert sizes.num_blocks == (72 * GIB - WEIGHTS - STEP - taken) // BLOCK
        assert "300.00 GiB for graphs are more than they can be" in caplog.text


def test_a_neighbour_that_was_quicker(caplog):
    """It took the memory between the reading and the taking: the pool is smaller, and that is told."""
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory)
        sizes = model.sizing.beside(model.peak, graph_bytes=GRAPHS)
        memory.others += 40 * GIB
        with caplog.at_level(logging.WARNING):
            fewer = model.sizing.settle(sizes, model.allocate)
        assert fewer.num_blocks == (39 * GIB - WEIGHTS - STEP - GRAPHS - 80 * GIB // 100) // BLOCK
        assert f"now {fewer.num_blocks} KV blocks, not {sizes.num_blocks}" in caplog.text
        assert model.sizing.account(weights_bytes=WEIGHTS).num_blocks == fewer.num_blocks


def test_a_neighbour_that_takes_everything():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory)
        memory.others += 68 * GIB
        with pytest.raises(ModelError, match=r"no memory is left for a KV pool on cuda:0: weights 10.00 GiB \+ activations"):
            model.place()


def test_one_that_is_always_quicker_ends_the_start():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory, gpu_memory_utilization=1.0)
        sizes = model.sizing.beside(model.peak)

        def allocate(_):
            memory.others += GIB
            raise NoRoom("no room")

        with pytest.raises(NoRoom, match="faster than a KV pool can be sized"):
            model.sizing.settle(sizes, allocate)


def test_a_pool_that_fails_where_memory_is_enough_is_an_error():
    with fake_gpu_memory(80 * GIB) as memory:
        model = Model(memory)
        sizes = model.sizing.beside(model.peak)

        def allocate(_):
            raise NoRoom("cuda:0 has no room")

        with pytest.raises(NoRoom, match="cuda:0 has no room"):
            model.sizing.settle(sizes, allocate)


def test_a_neighbour_that_leaves_is_no_error():
    """Free memory grows while it is measured: nothing is below zero."""
    with fake_gpu_memory(80 * GIB, others=30 * GIB) as memory:
        model = Model(memory, outside=-29 * GIB)
        sizes = model.place()
        assert sizes.num_blocks == (72 * GIB - WEIGHTS - STEP - GRAPHS) // BLOCK
        assert model.sizing.account(weights_bytes=WEIGHTS).outside_bytes == 0


def test_a_share_that_is_too_small():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory, gpu_memory_utilization=0.1)
        with pytest.raises(
            ModelError, match=r"gpu_memory_utilization 0.1 leaves no room .* 8.00 GiB of 80.00 GiB, and weights"
        ):
            model.place()


def test_models_of_one_process_are_neighbours():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        first = Model(memory, gpu_memory_utilization=0.5)
        one = first.place()
        assert one.num_blocks == (40 * GIB - WEIGHTS - STEP - GRAPHS) // BLOCK
        second = Model(memory, gpu_memory_utilization=0.5)
        rows = {row.name: row.value for row in second.sizing.account(weights_bytes=WEIGHTS).rows()}
        assert rows["others"] == GIB + WEIGHTS + one.num_blocks * BLOCK
        two = second.place()
        # of what is free, the first model's steps and graphs are not
        taken = GIB + WEIGHTS + one.num_blocks * BLOCK + STEP + GRAPHS
        room = 80 * GIB - taken - WEIGHTS - STEP - GRAPHS - 80 * GIB // 100
        assert two.num_blocks == min(room, 40 * GIB - WEIGHTS - STEP - GRAPHS) // BLOCK
        memory.take(STEP + GRAPHS)
        memory.take(STEP + GRAPHS)  # of both at once
        del first


def test_states_are_counted_once():
    """They are there while the largest step is measured, as they will be."""
    state = StateShape((GIB // 8,), torch.uint8)
    with fake_gpu_memory(80 * GIB) as memory:
        model = Model(memory, states=[state], weights=WEIGHTS + GIB)  # eight rows' states are a GiB
        sizes = model.place()
        assert sizes.num_blocks == (72 * GIB - WEIGHTS - GIB - STEP - GRAPHS) // BLOCK
        account = model.sizing.account(weights_bytes=WEIGHTS)
        assert (account.state_bytes, account.activation_bytes) == (GIB, STEP)


def test_an_exact_size_is_known_before_the_weights():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory, kv_cache_bytes=4 * GIB, wanted=4096)
        assert model.early == (2048, 4096)
        account = model.sizing.account(weights_bytes=WEIGHTS, graph_bytes=GRAPHS)
        assert account.limit_bytes is None  # the share says nothing then
        assert account.activation_bytes == activation_bytes(SCHEDULER, blueprint())
        notes = {row.name: row.note for row in account.rows()}
        assert notes["KV pool"] == "2,048 blocks × 2.00 MiB; cache.kv_cache_bytes"
        assert notes["activations"].startswith("estimated")
        with pytest.raises(NoRoom):
            model.sizing.settle(model.early, lambda _: (_ for _ in ()).throw(NoRoom("gone")))


def test_an_exact_size_that_the_device_has_not():
    with fake_gpu_memory(80 * GIB, others=70 * GIB):
        sized = PoolSizing(CacheConfig(kv_cache_bytes=20 * GIB), SCHEDULER, blueprint(), None)
        with pytest.raises(
            ModelError, match=r"kv_cache_bytes 20.00 GiB is more than cuda:0 has: 10.00 GiB of 80.00 GiB are"
        ):
            sized.before_weights(0)


def test_a_step_that_does_not_fit_beside_the_weights():
    with fake_gpu_memory(12 * GIB) as memory:
        memory.take(WEIGHTS)
        with pytest.raises(ModelError, match=r"largest step finds no memory .* lower scheduler.max_num_batched_tokens"):
            peak_bytes(GPU, lambda: memory.take(3 * GIB))
        with pytest.raises(ValueError, match="another"):
            peak_bytes(GPU, lambda: (_ for _ in ()).throw(ValueError("another")))


def test_what_was_measured_is_given_back():
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory, wasted=GIB)
        assert memory.reserved == memory.allocated == WEIGHTS
        assert model.peak.reserved_bytes - model.peak.allocated_bytes == GIB
        assert device_memory(GPU).outside_bytes == GIB


def test_an_encoder_has_no_pool():
    with fake_gpu_memory(80 * GIB):
        sized = PoolSizing(CacheConfig(), SCHEDULER, blueprint(is_encoder=True, num_kv_layers=0), 512)
        assert sized.before_weights(0) == (0, 512)
        names = [row.name for row in sized.account(weights_bytes=WEIGHTS).rows()]
        assert "weights" in names
        assert "KV pool" not in names


def test_the_same_words_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sizing, "host_memory", lambda: HostMemory(6 * GIB, "of 8.00 GiB", 8 * GIB))
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 6 * GIB)
    monkeypatch.setattr(kv_tensors, "promised_bytes", lambda: 0)
    sized = PoolSizing(CacheConfig(), SCHEDULER, blueprint(torch.device("cpu")), None)
    assert sized.before_weights(GIB).num_blocks == 3 * GIB // 2 // BLOCK
    rows = {row.name: row for row in sized.account(weights_bytes=GIB, adapter_bytes=MIB).rows()}
    words = ["device", "others", "weights", "adapters", "activations", "reserve", "KV pool", "tokens", "sequences"]
    assert list(rows) == words
    assert (rows["device"].value, rows["others"].value) == (8 * GIB, 2 * GIB)


def test_the_table_is_logged_and_plain(caplog):
    with fake_gpu_memory(80 * GIB, others=GIB) as memory:
        model = Model(memory)
        model.place()
        with caplog.at_level(logging.INFO):
            rows = model.sizing.account(weights_bytes=WEIGHTS, adapter_bytes=MIB).told(logging.getLogger("llmd.model"))
    words = ["device", "others", "share", "weights", "adapters", "activations", "graphs", "reserve", "KV pool", "tokens"]
    assert [row["name"] for row in rows] == [*words, "sequences"]
    assert all(word in caplog.text for word in words)
    assert all(set(row) == {"name", "value", "is_bytes", "note"} for row in rows)


@given(
    others=st.integers(0, 80 * GIB), weights=st.integers(1, 60 * GIB), share=st.floats(0.05, 1.0),
    grown=st.integers(-20 * GIB, 20 * GIB), wasted=st.integers(0, GIB), outside=st.integers(-GIB, GIB),
)  # fmt: skip
def test_whatever_neighbours_do_the_pool_fits_or_the_reason_is_told(others, weights, share, grown, wasted, outside):
    with fake_gpu_memory(80 * GIB, others) as memory:
        try:
            model = Model(memory, weights=weights, gpu_memory_utilization=share, wasted=wasted, outside=outside)
            memory.others = max(0, memory.others + grown)
            sizes = model.place()
        except torch.OutOfMemoryError:
            assert memory.free < weights  # no more than the loader's own
            return
        except ModelError:
            return
        assert sizes.num_blocks > 0
        assert sizes.num_blocks * BLOCK + weights + STEP + GRAPHS <= share * 80 * GIB
        memory.take(STEP + GRAPHS, wasted)  # the largest step, beside all graphs
        memory.give(STEP + GRAPHS)


def test_the_formulas_grow_with_what_they_are_of():
    shape = blueprint()
    more = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4000)
    assert activation_bytes(more, shape) > 3 * activation_bytes(SCHEDULER, shape)
    assert graph_bytes((), shape) == 0
    small, large = graph_bytes((1, 2, 4, 8), shape), graph_bytes((1, 2, 4, 8, 16), shape)
    assert large - small > 8 * 32000 * 4
    assert small < 64 * MIB + 4 * 32000 * 8
