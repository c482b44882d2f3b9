"""The backend by the kit, and a model that attends with it."""

import pytest
import torch
from acme_zeta.backend import Zeta

from llmd.api.v1 import SamplingParams
from llmd.api.v1.testing import check_attention_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend(dtype):
    check_attention_backend(Zeta(), dtype=dtype)


def test_engine(llmd_engine):
    llm = llmd_engine(attention_backend="zeta")
    (output,) = llm.generate("hello", SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
