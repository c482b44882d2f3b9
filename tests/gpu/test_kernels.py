"""Every kernel at odd sizes, in each dtype of a model, against its reference."""

import pytest
import torch
from gpu.kernel_cases import CASES

from benchmarks.gpu.host import ROOT

BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 1e-4}
INTEGERS = ("prepare_batch", "sampling", "bitmask")  # no dtype of a model in them
LEAST = {  # where a number in eight bits may fall on the other side, or a device adds such numbers up with less than 24 bits
    "fp8_linear": 5e-3, "int8_linear": 5e-3, "store_kv": 3e-2,
}  # fmt: skip
ON_A_CPU = {"grouped_linear": 2e-2}  # activations become eight bits there
WITHOUT_NORM = 1e-12


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_its_reference_gives(name, dtype, device):
    if name in INTEGERS and dtype != torch.float32:
        pytest.skip("the same for all dtypes")
    torch.manual_seed(0)
    of_cpu = ON_A_CPU.get(name, 0.0) if device.type == "cpu" else 0.0
    bound = max(BOUNDS[dtype], LEAST.get(name, 0.0), of_cpu)
    for case, got, expected in CASES[name](device, dtype):
        assert got.shape == expected.shape, case
        if got.dtype.is_floating_point:
            assert error(got, expected) < bound, case
        else:
            assert torch.equal(got.cpu(), expected.cpu()), case


def error(got, expected):
    """In the 2-norm, relative; NaN is no number below any bound."""
    got, expected = got.double().cpu(), expected.double().cpu()
    known = ~expected.isnan()  # slots that nobody has written
    assert torch.equal(got.isnan(), ~known)
    return float((got - expected)[known].norm() / expected[known].norm().clamp(min=WITHOUT_NORM))


def test_every_kernel_is_tested_on_a_device():
    folders = {path.parent.name for path in (ROOT / "kernels").glob("llmd_kernels/*/triton.py")}
    assert folders == {name.partition(":")[0] for name in CASES}
