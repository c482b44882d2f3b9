"""What a step gives besides tokens, and that one row's trouble stays its own."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from model.step_driver import GREEDY, StepDriver, make_runner, model_parts
from model.tiny_models import VOCAB_SIZE, make_model, prompts, reference_generate, reference_logits, save_model

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import StepPlan, TokenUpdate


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def driver(path):
    return StepDriver(make_runner(path))


# --- prompt log-probabilities


@pytest.mark.parametrize("chunks", [(31,), (7, 11, 13), (30, 1)])
def test_prompt_logprobs(driver, model, chunks):
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    sequence = driver.sequence(prompts(31)[0], params)
    other = driver.sequence(prompts(5, seed=3)[0])
    entries = []
    for chunk in chunks:
        work = [(sequence, chunk)] if other.computed else [(other, 5), (sequence, chunk)]
        counts = [chunk] if len(work) == 1 else [1, chunk]
        result = driver.step(work, num_logits=counts)
        entries += result.prompt_logprobs.get(sequence.row, [])
        assert other.row not in result.prompt_logprobs
    expected = reference_logits(model, sequence.tokens[:31]).log_softmax(-1)
    assert [entry.token_id for entry in entries] == sequence.tokens[1:31]
    for position, entry in enumerate(entries):
        line = expected[position]
        assert entry.logprob == pytest.approx(line[entry.token_id].item(), abs=1e-4)
        assert entry.rank == int((line > line[entry.token_id]).sum()) + 1
        assert entry.top_logprobs == pytest.approx(line.topk(3).values.tolist(), abs=1e-4)


def test_prompt_logits_are_computed_a_few_at_a_time(driver, monkeypatch):
    from llmd.model import outputs

    monkeypatch.setattr(outputs, "_LOGITS_BYTES_AT_ONCE", 4 * VOCAB_SIZE * 5)
    sizes = []
    inner = driver.runner._scorer._logits
    monkeypatch.setattr(driver.runner._scorer, "_logits", lambda hidden: sizes.append(len(hidden)) or inner(hidden))
    sequence = driver.sequence(prompts(31)[0], SamplingParams(temperature=0.0, prompt_logprobs=0))
    result = driver.step([(sequence, 31)], num_logits=[31])
    assert len(result.prompt_logprobs[sequence.row]) == 30
    assert max(sizes) == 5


# --- pooling


@torch.no_grad()
def hidden_states(model, token_ids):
    return model.model(torch.tensor([token_ids])).last_hidden_state[0]


@pytest.mark.parametrize("chunks", [(23,), (5, 7, 11)])
@pytest.mark.parametrize(
    "params",
    [PoolingParams(), PoolingParams(pooling="mean"), PoolingParams(pooling="mean", normalize=False),
     PoolingParams(dimensions=17), PoolingParams(pooling="cls"), PoolingParams(pooling="max"),
     PoolingParams(pooling="mean_sqrt_len", normalize=False), PoolingParams(pooling="all"),
     PoolingParams(pooling="all", normalize=False, dimensions=9)],
    ids=str,
)  # fmt: skip
def test_pooling(driver, model, params, chunks):
    sequence = driver.sequence(prompts(23)[0], params)
    *first, last = [driver.step([(sequence, chunk)]) for chunk in chunks]
    assert all(not result.pooled for result in first)
    hidden = hidden_states(model, sequence.tokens)
    pooled = {
        "mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "mean_sqrt_len": hidden.sum(0) / 23**0.5,
        "all": hidden,
    }  # fmt: skip
    expected = pooled.get(params.pooling, hidden[-1])[..., : params.dimensions]
    if params.normalize is not False:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    vector = last.pooled[sequence.row]
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_vectors_and_tokens_in_one_step(driver, model):
    pooled = driver.sequence(prompts(6)[0], PoolingParams())
    generated = driver.sequence(prompts(9, seed=2)[0])
    result = driver.step([(pooled, 6), (generated, 9)])
    assert set(result.pooled) == {pooled.row}
    assert generated.tokens == reference_generate(model, generated.tokens[:9], 1)


def test_a_mean_without_its_beginning_is_an_error(driver):
    sequence = driver.sequence(prompts(9)[0], PoolingParams(pooling="mean"))
    sequence.computed = 4
    result = driver.step([(sequence, 5)])
    assert "every hidden state" in result.errors[sequence.row]
    assert not result.pooled


def test_a_model_without_a_head_does_not_classify(driver):
    sequence = driver.sequence([1, 2], PoolingParams(task="classify"))
    result = driver.step([(sequence, 2)])
    assert "no classification head" in result.errors[sequence.row]
    assert not result.pooled


def test_more_dimensions_than_there_are(driver):
    sequence = driver.sequence([1, 2], PoolingParams(dimensions=61))
    assert "at most 60" in driver.step([(sequence, 2)]).errors[sequence.row]


# --- trouble


def test_token_ids_beyond_the_vocabulary_end_that_row_only(driver, model):
    bad = driver.sequence([5, VOCAB_SIZE, 3])
    good = driver.sequence(prompts(8)[0])
    result = driver.step([(bad, 3), (good, 8)])
    assert "below 97" in result.errors[bad.row]
    assert set(result.errors) == {bad.row}
    assert good.tokens == reference_generate(model, good.tokens[:8], 1)
    driver.release(bad)
    again = driver.sequence([5, 2, 3])
    assert not driver.step([(again, 3)]).errors


def test_nan_ends_that_row_only(driver, model):
    bad, good = driver.sequence(prompts(5)[0]), driver.sequence(prompts(8, seed=4)[0])
    driver.step([(bad, 5), (good, 8)])
    block = driver.runner.rows.block_tables[0][bad.row, 0]
    driver.runner.kv.pool[block] = float("nan")
    result = driver.step([(good, 1), (bad, 1)])
    assert set(result.errors) == {bad.row}
    assert "not finite" in result.errors[bad.row]
    assert good.tokens == reference_generate(model, good.tokens[:8], 2)


class Refusing:
    """A logits processor that fails on one row."""

    keeps_argmax = False

    def wants(self, params):
        return params.temperature == 0.5

    def admit(self, admit):
        raise KeyError("no table")

    def release(self, row):
        pass

    def apply(self, logits, rows):
        return logits


def test_a_processor_that_raises_ends_that_row_only(path, model, monkeypatch):
    spec = type("Spec", (), {"order": 1, "build": staticmethod(lambda context: Refusing())})
    parts = dataclasses.replace(model_parts(), logits_processors={"refusing": spec})
    monkeypatch.setattr("model.step_driver.model_parts", lambda: parts)
    driver = StepDriver(make_runner(path))
    bad = driver.sequence([1, 2], SamplingParams(temperature=0.5))
    good = driver.sequence(prompts(8)[0])
    result = driver.step([(bad, 2), (good, 8)])
    assert "no table" in result.errors[bad.row]
    assert good.tokens == reference_generate(model, good.tokens[:8], 1)


def test_a_step_without_rows_only_applies(driver):
    sequence = driver.sequence([1, 2, 3])
    driver.step([(sequence, 3)])
    result = driver.runner.run(StepPlan(step_id=9, released=[sequence.row]))
    assert result.step_id == 9
    assert not result.token_ids


# --- grammars


def test_masks_bar_tokens_of_their_rows(driver, model):
    free, bound = driver.sequence(prompts(8)[0]), driver.sequence(prompts(8)[0])
    plan = driver.plan([(free, 8), (bound, 8)])
    words = np.zeros((1, -(-VOCAB_SIZE // 32)), np.int32)
    words[0, 2] = 1 << 5  # token 69
    masks = Future()
    masks.set_result(words)
    result = driver.runner.run(dataclasses.replace(plan, masked=[1]), masks)
    assert result.token_ids[1] == 69
    assert free.tokens + result.token_ids[:1] == reference_generate(model, free.tokens, 1)


def test_forced_tokens_are_written_before_the_step(driver, model):
    sequence = driver.sequence(prompts(8)[0])
    driver.step([(sequence, 8)])
    sequence.tokens[8:] = [3, 4, 5]
    plan = dataclasses.replace(driver.plan([(sequence, 3)]), token_updates=[TokenUpdate(sequence.row, 8, [3, 4, 5])])
    result = driver.runner.run(plan)
    assert sequence.tokens + result.token_ids == reference_generate(model, sequence.tokens, 1)


# --- the rest


def test_the_last_token_of_the_context_may_be_sampled(path, model):
    driver = StepDriver(make_runner(path, max_model_len=12))
    sequence = driver.sequence(prompts(12)[0])
    driver.step([(sequence, 12)])
    assert sequence.tokens == reference_generate(model, sequence.tokens[:12], 1)


def test_seeds_decide_whatever_the_batch(driver):
    params = SamplingParams(temperature=1.0, max_tokens=50)
    first = driver.sequence(prompts(8)[0], params, seed=11)
    driver.generate([first], 10)
    second = driver.sequence(first.tokens[:8], params, seed=11)
    others = [driver.sequence(prompt, params, seed=7) for prompt in prompts(3, 20, 9)]
    driver.generate([others[0], second, *others[1:]], 10, chunks=(3, 4))
    assert first.tokens == second.tokens


def test_sleep_and_wake(driver, model):
    driver.runner.release_kv()
    assert driver.runner.kv.pool is None
    driver.runner.refill_kv()
    sequence = driver.sequence(prompts(8)[0])
    driver.generate([sequence], 3)
    assert sequence.tokens == reference_generate(model, sequence.tokens[:8], 3)


def test_rows_know_their_params_only_while_held(driver):
    sequence = driver.sequence([1, 2, 3], GREEDY)
    driver.step([(sequence, 3)])
    row = sequence.row
    driver.release(sequence)
    driver.runner.run(driver.plan([]))
    assert row not in driver.runner._params
