"""The Triton sampler draws the torch sampler's tokens, in the interpreter on a CPU, and on a GPU where there is one."""

import pytest
import torch
from kernels.test_triton import run_script
from model.sampling_reference import MAX_LEN, V, make_admit

from llmd.model.sampler import SamplerContext, TorchSampler


def test_mixtures_in_the_interpreter_are_the_torch_samplers():
    found = run_script("../model/sampler_interpreted.py", TRITON_INTERPRET="1")
    assert found.pop("largest logprob error") < 1e-5
    assert (found.pop("steps"), found.pop("tokens")) == (9, 54)
    assert {name: count for name, count in found.items() if count} == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("params", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01, "top_p": 0.99, "temperature": 1.7}])
def test_a_gpu_draws_what_torch_draws_on_it(params):
    from llmd.model.sampler_triton import TritonSampler

    width, num = 151_936, 16
    context = SamplerContext(max_num_rows=num, max_model_len=MAX_LEN, vocab_size=width, device=torch.device("cuda"))
    logits, rows = torch.randn(num, width, device="cuda") * 3, torch.arange(num, device="cuda")
    drawn = []
    for kind in (TorchSampler, TritonSampler):
        sampler = kind(context)
        for row in range(num):
            sampler.admit(make_admit(row, seed=row, presence_penalty=0.1, logit_bias={V: 1.5}, **params))
        token_ids = torch.ones(num, MAX_LEN, dtype=torch.int32, device="cuda")
        known = {"host_rows": list(range(num)), "max_tokens": 3}
        drawn.append(sampler.sample(logits.clone(), rows, torch.full_like(rows, 3), token_ids, **known).token_ids)
    assert torch.equal(*drawn)
