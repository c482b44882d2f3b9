"""The kernels around a step: what their packages check, and the Triton ones without a GPU, by numbers and by compilation."""

import pytest
import torch
from kernels.test_triton import run_script

from llmd_kernels.bitmask import mask_logits
from llmd_kernels.logprobs import token_logprobs
from llmd_kernels.penalties import Bias, new_scratch, penalise
from llmd_kernels.prepare_batch import DecodeInputs, new_inputs, prepare_batch, prepare_decode
from llmd_kernels.sampling import Knobs, deliver, sample, tiles

CPU = torch.device("cpu")


def test_in_the_interpreter_they_equal_their_references():
    found = run_script("step_interpreted.py", TRITON_INTERPRET="1")
    assert len(found) > 20
    assert {case: differing for case, differing in found.items() if differing} == {}


def test_all_compile_for_gpus_within_shared_memory_and_registers():
    found = run_script("step_compiled.py", TRITON_INTERPRET="0")
    assert set(found) == {"sm_80", "sm_90", "gfx942"}
    for target, kernels in found.items():
        assert len(kernels) >= 15
        assert not {name: trouble for name, trouble in kernels.items() if trouble}, target


def test_a_step_of_mixed_rows_and_free_places():
    token_ids, blocks = torch.arange(60).view(3, 20).int(), torch.tensor([[7, 3], [1, 0], [4, 9]]).int()
    out = new_inputs(8, 4, CPU)
    columns = torch.tensor([[2, 0, 1, 0], [9, 0, 11, 0], [2, 3, 1, 0]])
    prepare_batch(out, columns, token_ids, blocks, 10, pad_slot=5)
    assert out.input_ids.tolist() == [49, 50, 0, 1, 2, 31, 0, 0]
    assert out.positions.tolist() == [9, 10, 0, 1, 2, 11, 0, 0]
    assert out.token_rows.tolist() == [2, 2, 0, 0, 0, 1, 0, 0]
    assert out.slot_mapping.tolist() == [49, 90, 70, 71, 72, 1, 5, 5]
    assert out.seq_lens.tolist() == [11, 3, 12, 0]
    assert out.query_start.tolist() == [0, 2, 5, 6, 6]


@pytest.mark.parametrize(
    ("columns", "blocks", "words"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), True, r"columns \[3, R\] for R 4, got \[3, 2\]"),
        (torch.zeros(3, 4, dtype=torch.int32), True, "contiguous int64 columns, got torch.int32"),
        (torch.zeros(4, 3, dtype=torch.int64).t(), True, "contiguous int64 columns"),
        (torch.zeros(3, 4, dtype=torch.int64), False, "8 slots for 8 tokens"),
    ],
)
def test_buffers_that_do_not_fit(columns, blocks, words):
    tokens = torch.zeros(3, 20, dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        prepare_batch(new_inputs(8, 4, CPU), columns, tokens, tokens if blocks else None)


def test_a_decode_step_and_the_block_that_comes_with_it():
    token_ids, blocks = torch.arange(60).view(3, 20).int(), torch.tensor([[7, 3], [1, 0], [4, 9]]).int()
    out = DecodeInputs(*(torch.zeros(3, dtype=of) for of in (torch.int64, torch.int64, torch.int32, torch.int64)))
    prepare_decode(out, torch.tensor([[2, 0, 1], [9, 3, 10], [-1, -1, 6]]), token_ids, blocks, 10)
    assert out.input_ids.tolist() == [49, 3, 30]
    assert out.slot_mapping.tolist() == [49, 73, 60]
    assert out.seq_lens.tolist() == out.num_tokens.tolist() == [10, 4, 11]
    assert blocks.tolist() == [[7, 3], [1, 6], [4, 9]]


def test_what_decode_inputs_and_masks_do_not_take():
    tokens, of = torch.zeros(3, 20, dtype=torch.int32), (torch.int64, torch.int64, torch.int32, torch.int64)
    out = DecodeInputs(*(torch.zeros(2, dtype=dtype) for dtype in of))
    with pytest.raises(ValueError, match=r"dense int64 columns \[3, R\], got torch.int32"):
        prepare_decode(out, torch.zeros(3, 2, dtype=torch.int32), tokens, tokens)
    with pytest.raises(ValueError, match="3 places in each column and 3 slots"):
        prepare_decode(out, torch.zeros(3, 3, dtype=torch.int64), tokens, tokens)
    with pytest.raises(ValueError, match="2 places in each column and 0 slots"):
        prepare_decode(out, torch.zeros(3, 2, dtype=torch.int64), tokens, None)
    places = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask_logits wants logits"):
        mask_logits(torch.zeros(2, 33), places, torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"contiguous int32 words, got torch\.int64, torch\.int64"):
        mask_logits(torch.zeros(2, 33), places, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int32 out \[2, 3\], got torch.int32 \[3, 2\]"):
        deliver(torch.arange(3), torch.zeros(3), torch.arange(3), torch.arange(3), tokens, torch.zeros(3, 2).int())


def test_draws_follow_the_distribution():
    count = 4000
    knobs = Knobs(torch.arange(count), torch.tensor([[1.0, 3, 0.9, 0.0]], dtype=torch.float64).expand(count, 4).contiguous())
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0]]).log().expand(count, 4)  # top_k leaves 3, 2, 1 of 6; top_p 3 and 2 and 1
    tokens, best = sample(logits, torch.arange(count), torch.ones(count, dtype=torch.int64), knobs)
    shares = torch.bincount(tokens, minlength=4) / count
    torch.testing.assert_close(shares, torch.tensor([1 / 6, 1 / 2, 0.0, 1 / 3]), rtol=0, atol=0.03)
    assert torch.equal(best, torch.full((count,), 3.0).log())


def test_shapes_that_do_not_fit():
    rows, knobs = torch.arange(2), Knobs(torch.zeros(2, dtype=torch.int64), torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="sample wants logits"):
        sample(torch.zeros(3, 9), rows, rows, knobs)
    with pytest.raises(ValueError, match="sample wants logits"):
        sample(torch.zeros(2, 0), rows, rows, knobs)
    with pytest.raises(ValueError, match="penalise wants float32 logits"):
        penalise(torch.zeros(2, 9).half(), rows, rows, torch.zeros(2, 3).int(), None)
    with pytest.raises(ValueError, match="token_logprobs wants 3 tokens"):
        token_logprobs(torch.zeros(3, 9), rows, 1)


def test_penalties_by_hand():
    facts = torch.tensor([[2.0, 2.0, 0.25, 0.5]])
    tokens = torch.tensor([[1, 2, 2, 3, 3, 9, 0]]).int()  # two of the prompt, four put out, one outside, one not reached
    bias = Bias(torch.tensor([0, 1]).int(), torch.tensor([4]), torch.tensor([7.0]))
    logits = torch.tensor([[1.0, 2.0, -2.0, 4.0, 1.0]])
    scratch = new_scratch(1, 5, CPU)
    changed = penalise(logits, torch.tensor([0]), torch.tensor([6]), tokens, facts, scratch, bias)
    assert changed.tolist() == [[1.0, 1.0, -4.75, 1.0, 8.0]]
    assert scratch.shape == (1, 5)


def test_a_scratch_is_bounded():
    assert new_scratch(256, 151_936, CPU).shape == (110, 151_936)
    assert new_scratch(256, 1 << 30, torch.device("meta")).shape[0] == 1


def test_parts_of_rows_hang_on_rows_and_vocabulary_alone():
    assert [tiles.num_splits(rows, 151_936, 132) for rows in (1, 8, 64, 256, 4096)] == [32, 32, 8, 2, 1]
    assert tiles.num_splits(1, 300, 132) == 1
    assert tiles.num_splits(0, 300, 1) == 1
