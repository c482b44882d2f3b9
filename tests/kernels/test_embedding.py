"""embedding against torch, at odd sizes, and with ids that are none of the table's."""

import pytest
import torch
import torch.nn.functional as F

from llmd_kernels import native
from llmd_kernels.embedding import cpu, embedding, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("rows", "dim", "count"), [(1, 1, 1), (7, 63, 3), (50, 896, 300), (5, 20, 0)])
def test_rows_of_a_table(dtype, rows, dim, count):
    table = torch.randn(rows, dim).mul(10).to(dtype)
    ids = torch.randint(0, rows, (count,))
    expected = table[ids]
    assert torch.equal(embedding(ids, table), expected)
    assert torch.equal(embedding(ids.int(), table), expected)
    assert torch.equal(reference.embedding(ids, table), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_part_of_wider_ones_and_ids_of_two_dims(dtype):
    table = torch.randn(9, 40).to(dtype)[:, 3:20]
    ids = torch.randint(0, 9, (4, 5))
    assert torch.equal(embedding(ids, table), F.embedding(ids, table))
    assert torch.equal(embedding(ids.t(), table), F.embedding(ids.t(), table))
    assert torch.equal(embedding(torch.tensor([1, 2]), table.t()), F.embedding(torch.tensor([1, 2]), table.t()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_id_outside_the_table_reads_the_nearest_row(dtype):
    table = torch.randn(6, 17).to(dtype)
    ids = torch.tensor([-1, 6, 1 << 62, -(1 << 63), 5])
    assert torch.equal(embedding(ids, table), table[torch.tensor([0, 5, 5, 0, 5])])


@pytest.mark.skipif(native.library() is None, reason="no compiler: there is only the reference")
def test_the_compiled_kernel_says_what_torch_says():
    table, ids = torch.randn(500, 129).bfloat16(), torch.randint(0, 500, (700,))
    assert torch.equal(cpu.embedding(ids, table), F.embedding(ids, table))


@pytest.mark.parametrize(
    ("ids", "table", "words"),
    [
        (torch.tensor([0]), torch.zeros(3), r"a table \[N, D\], got \(3,\)"),
        (torch.tensor([0]), torch.zeros(0, 4), r"a table \[N, D\], got \(0, 4\)"),
        (torch.tensor([0.0]), torch.zeros(3, 4), "int32 or int64 ids, got torch.float32"),
    ],
)
def test_what_it_does_not_serve_is_told(ids, table, words):
    with pytest.raises(ValueError, match=words):
        embedding(ids, table)
