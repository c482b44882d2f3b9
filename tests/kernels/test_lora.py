"""Shrink and expand over slots of different ranks, native and in Triton, against the plain loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.lora import LoraWeights, add_lora, add_lora_of_ids, cpu, reference, rows_of_slots

CPU = torch.device("cpu")
# slots, outputs of each part, inputs, largest rank, the slots' ranks by part, each row's slot
CASES = {
    "one row": (1, (7,), 5, 8, [[8]], [0]),
    "no row has one": (2, (16,), 16, 8, [[8], [8]], [-1, -1]),
    "merged parts": (3, (33, 300, 16), 77, 16, [[16, 0, 3], [5, 7, 1], [0, 0, 0]], [-1, 0, 2, 1, 1, 2, -1, 0]),
    "many rows of one": (2, (70, 1), 130, 64, [[64, 33], [1, 2]], [0] * 39 + [1, -1] + [0] * 5),
    "a row each": (9, (272,), 64, 32, [[rank] for rank in (1, 2, 4, 8, 16, 17, 31, 32, 0)], [8, 7, 6, 5, 4, 3, 2, 1, 0]),
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def made(slots, outputs, depth, max_rank, ranks, rows, dtype=torch.float32, out_dtype=torch.float32):
    """Weights whose unused places are NaN, rows, x and y."""
    torch.manual_seed(0)
    starts = [0]
    for size in outputs:
        starts.append(starts[-1] + size)
    a, b = torch.randn(slots, len(outputs), max_rank, depth), torch.randn(slots, max_rank, starts[-1])
    for slot in range(slots):
        for part, rank in enumerate(ranks[slot]):
            a[slot, part, rank:] = float("nan")
            b[slot, rank:, starts[part] : starts[part + 1]] = float("nan")
    weights = LoraWeights(a.to(dtype), b.to(dtype), torch.tensor(ranks, dtype=torch.int32), tuple(starts))
    x, y = torch.randn(len(rows), 2 * depth).to(dtype)[:, :depth], torch.randn(len(rows), starts[-1]).to(out_dtype)
    return weights, rows_of_slots(torch.tensor(rows), slots, CPU), x, y


def by_hand(y, x, weights, rows):
    """Row by row in float64."""
    out = y.double()
    for row, slot in enumerate(rows):
        for part, rank in enumerate(weights.ranks[slot].tolist() if slot >= 0 else ()):
            low, high = weights.part_starts[part : part + 2]
            hidden = weights.a[slot, part, :rank].double() @ x[row].double()
            out[row, low:high] += hidden @ weights.b[slot, :rank, low:high].double()
    return out


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [reference, cpu])
def test_add_lora(case, dtype, out_dtype, way):
    if way is cpu and native.library() is None:
        pytest.skip("no compiler")
    weights, rows, x, y = made(*CASES[case], dtype, out_dtype)
    expected = by_hand(y, x, weights, CASES[case][-1])
    actual = way.add_lora(y.clone(), x, weights, rows)
    tolerance = 1e-4 if out_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max()))
    )
    untouched = [row for row, slot in enumerate(CASES[case][-1]) if slot < 0]
    assert torch.equal(actual[untouched], y[untouched])


def test_a_row_is_the_same_whatever_else_is_in_the_batch():
    case = (3, (65,), 50, 16, [[16], [8], [4]], [0, 1, 2, 0, 0, 0, 0, -1, 1])
    weights, rows, x, y = made(*case)
    together = add_lora(y.clone(), x, weights, rows)
    for row, slot in enumerate(case[-1]):
        alone = rows_of_slots(torch.tensor([slot]), 3, CPU)
        torch.testing.assert_close(add_lora(y[row : row + 1].clone(), x[row : row + 1], weights, alone)[0], together[row])


def test_rows_are_grouped_by_slot():
    rows = rows_of_slots(torch.tensor([2, -1, 0, 2, -1, 0]), 4, CPU)
    assert rows.tokens.tolist() == [2, 5, 0, 3]
    assert rows.starts.tolist() == [0, 2, 2, 4, 4]
    assert rows.spans == ((0, 0, 2), (2, 2, 4))


def test_an_embedding_takes_rows_of_a():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 30, 8), torch.randn(2, 8, 12)
    weights = LoraWeights(a, b, torch.tensor([[8], [3]], dtype=torch.int32), (0, 12))
    ids, slots, y = torch.tensor([4, 4, 29, 0]), [0, 1, -1, 1], torch.randn(4, 12)
    actual = add_lora_of_ids(y.clone(), ids, weights, rows_of_slots(torch.tensor(slots), 2, CPU))
    expected = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            rank = (8, 3)[slot]
            expected[row] += a[slot, 0, ids[row], :rank] @ b[slot, :rank]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("x", "y"), [((2, 4), (2, 6)), ((3, 5), (2, 6)), ((2, 5), (2, 7))])
def test_wrong_shapes_are_told(x, y):
    weights = LoraWeights(torch.zeros(1, 1, 4, 5), torch.zeros(1, 4, 6), torch.zeros(1, 1, dtype=torch.int32), (0, 6))
    with pytest.raises(ValueError, match="add_lora wants"):
        add_lora(torch.zeros(y), torch.zeros(x), weights, rows_of_slots(torch.tensor([0, 0]), 1, CPU))


def run_script(name, **environment):
    """Run one of the scripts below in a process of its own: Triton reads its environment when it is imported."""
    pytest.importorskip("triton")
    source = (Path(__file__).parent / name).read_text()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_in_the_interpreter():
    for case, error in run_script("lora_interpreted.py", TRITON_INTERPRET="1").items():
        assert error < 1e-5, case


def test_triton_compiles_for_gpus_without_spills():
    for target, kernels in run_script("lora_compiled.py", TRITON_INTERPRET="0").items():
        assert len(kernels) == 6
        assert not any(kernels.values()), (target, kernels)
