"""Decode steps that are recorded give what the model gives layer by layer."""

import pytest
from model.made_adapters import make_adapter
from model.step_driver import GREEDY, StepDriver, make_runner
from model.tiny_models import make_model, prompts, save_model

from llmd.engine.params import SamplingParams
from llmd_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "Qwen3"])
def path(request, tmp_path_factory):
    return save_model(make_model(request.param), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(make_model("Llama"), tmp_path_factory.mktemp("llama"))


def generate(driver, lengths, steps, params=GREEDY):
    """Rows that come one after another and leave in another order; all tokens."""
    sequences = [driver.sequence(prompts(length, seed=length)[0], params) for length in lengths]
    running = []
    for sequence in sequences:
        driver.step([(sequence, len(sequence.tokens)), *((other, 1) for other in running)])
        running.append(sequence)
    for _ in range(steps):
        driver.step([(sequence, 1) for sequence in running])
    driver.step([(sequence, 1) for sequence in running[1:]])
    return [sequence.tokens for sequence in sequences]


def graphs(driver):
    return driver.runner._graphs._graphs


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_as_layer_by_layer(path, quantization):
    model = {"dtype": "bfloat16", "quantization": quantization}
    recorded = StepDriver(make_runner(path, **model))
    eager = StepDriver(make_runner(path, enforce_eager=True, **model))
    params = SamplingParams(temperature=0.8, top_k=20, max_tokens=64, logprobs=2)
    for case in (GREEDY, params):
        assert generate(recorded, (5, 9, 1, 17), 6, case) == generate(eager, (5, 9, 1, 17), 6, case)
    assert {rows for rows, _ in graphs(recorded)} == {1, 3, 4}
    assert not graphs(eager)


def test_logits_are_equal_bit_by_bit(llama):
    recorded, eager = (StepDriver(make_runner(llama, dtype="bfloat16", enforce_eager=off)) for off in (False, True))
    found = []
    for driver in (recorded, eager):
        params = SamplingParams(temperature=0.0, logprobs=5)
        sequence = driver.sequence(prompts(7)[0], params)
        driver.step([(sequence, 7)])
        found.append([driver.step([(sequence, 1)]).logprobs[sequence.row] for _ in range(5)])
    assert found[0] == found[1]
    assert graphs(recorded)


def test_a_pool_that_moved_is_recorded_anew(llama):
    driver = StepDriver(make_runner(llama, dtype="bfloat16"))
    sequence = driver.sequence(prompts(7)[0])
    driver.step([(sequence, 7)])
    driver.step([(sequence, 1)])
    assert graphs(driver)
    driver.runner.release_kv()
    assert not graphs(driver)
    driver.runner.refill_kv()
    again = StepDriver(driver.runner)
    sequence = again.sequence(prompts(7)[0])
    again.step([(sequence, 7)])
    for _ in range(4):
        again.step([(sequence, 1)])
    fresh = StepDriver(make_runner(llama, dtype="bfloat16", enforce_eager=True))
    other = fresh.sequence(prompts(7)[0])
    fresh.step([(other, 7)])
    for _ in range(4):
        fresh.step([(other, 1)])
    assert sequence.tokens == other.tokens


def test_a_model_that_cannot_be_recorded_runs_as_before(llama, caplog):
    with caplog.at_level("INFO", logger="llmd.model"):
        driver = StepDriver(make_runner(llama, dtype="float32"))
    tokens = generate(driver, (5, 9), 4)
    assert tokens == generate(StepDriver(make_runner(llama, dtype="float32", enforce_eager=True)), (5, 9), 4)
    assert not graphs(driver)
    assert [record.message for record in caplog.records if "not recorded" in record.message]


def test_the_number_of_graphs_is_bounded(llama, monkeypatch):
    monkeypatch.setattr("llmd.model.graphs.MAX_GRAPHS", 2)
    driver = StepDriver(make_runner(llama, dtype="bfloat16"))
    generate(driver, (5, 6, 7, 8), 2)
    sequences = [driver.sequence(prompts(4, seed=9)[0]) for _ in range(4)]
    driver.step([(sequence, 4) for sequence in sequences])
    for count in (1, 2, 3, 4, 2):
        driver.step([(sequence, 1) for sequence in sequences[:count]])
    assert list(graphs(driver)) == [(4, 0), (2, 0)]


def test_layers_are_counted(llama):
    driver = StepDriver(make_runner(llama, dtype="bfloat16"))
    sequence = driver.sequence(prompts(5)[0])
    driver.step([(sequence, 5)])
    driver.step([(sequence, 1)])
    before = driver.runner.num_layers_done
    driver.step([(sequence, 1)])
    assert driver.runner.num_layers_done > before


def test_memory_is_shared_by_all_sizes(llama):
    driver = StepDriver(make_runner(llama, dtype="bfloat16"))
    sequences = [driver.sequence(prompts(4, seed=seed)[0]) for seed in range(8)]
    driver.step([(sequence, 4) for sequence in sequences])
    driver.step([(sequence, 1) for sequence in sequences])
    pool = driver.runner._graphs._capture._pool
    taken = pool.num_bytes
    for count in range(1, 9):
        driver.step([(sequence, 1) for sequence in sequences[:count]])
    assert pool.num_bytes <= 2 * taken


def with_adapters(path, adapters, **model):
    driver = StepDriver(make_runner(path, dtype="bfloat16", adapters={"max_loras": 3, "max_lora_rank": 16}, **model))
    for slot, adapter in enumerate(adapters):
        driver.load_adapter(adapter, slot)
    sequences = [
        driver.sequence(prompts(length, seed=length)[0], slot=slot) for length, slot in ((5, 0), (9, None), (7, 1), (3, 0))
    ]
    driver.step([(sequence, len(sequence.tokens)) for sequence in sequences])
    for count in (4, 4, 3, 4, 2):
        driver.step([(sequence, 1) for sequence in sequences[:count]])
    plain = [sequences[1]]
    driver.step([(sequence, 1) for sequence in plain])
    driver.load_adapter(adapters[0], 1)
    for _ in range(2):
        driver.step([(sequence, 1) for sequence in sequences[1:]])
    return driver, [sequence.tokens for sequence in sequences]


def test_adapters_are_recorded_as_they_lie_in_their_slots(tmp_path):
    model = make_model("Qwen2")
    path = save_model(model, tmp_path / "base")
    made = [
        make_adapter(model, tmp_path / name, seed=index, rank=8, targets=targets).path
        for index, (name, targets) in enumerate({"a": ("q_proj", "down_proj"), "b": ("up_proj", "lm_head")}.items())
    ]
    recorded, tokens = with_adapters(path, made)
    _, expected = with_adapters(path, made, enforce_eager=True)
    assert tokens == expected
    assert {rows for rows, variant in graphs(recorded) if variant} == {3}
    assert {variant for _, variant in graphs(recorded)} == {0, 3}  # those of what slots held before are gone


def test_an_adapter_that_cannot_be_recorded_leaves_the_others_recorded(tmp_path, caplog):
    model = make_model("Qwen2")
    path = save_model(model, tmp_path / "base")
    made = [make_adapter(model, tmp_path / "dora", seed=0, rank=8, config={"use_dora": True}).path]
    made.append(make_adapter(model, tmp_path / "plain", seed=1, rank=8).path)
    with caplog.at_level("INFO", logger="llmd.model"):
        recorded, tokens = with_adapters(path, made)
    assert tokens == with_adapters(path, made, enforce_eager=True)[1]
    assert {variant for _, variant in graphs(recorded)} == {0}
    assert [record.message for record in caplog.records if "with these adapters are not recorded" in record.message]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_row_is_the_same_alone_and_in_a_batch_bit_by_bit(path, quantization):
    driver = StepDriver(make_runner(path, dtype="bfloat16", quantization=quantization))
    params = SamplingParams(temperature=0.0, logprobs=5)
    found = []
    for others in (0, 15):
        sequence = driver.sequence(prompts(11)[0], params)
        batch = [sequence, *(driver.sequence(prompts(3 + length, seed=length)[0]) for length in range(others))]
        driver.step([(one, len(one.tokens)) for one in batch])
        found.append([driver.step([(one, 1) for one in batch]).logprobs[sequence.row] for _ in range(6)])
        for one in batch:
            driver.release(one)
    assert found[0] == found[1]
