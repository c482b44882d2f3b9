"""The processor by the kit, and in the engine."""

import itertools

from acme_zeta import llmd_register_logits_processors

from llmd.api.v1 import SamplingParams
from llmd.api.v1.testing import check_logits_processor

PARAMS = SamplingParams(frequency_penalty=2, temperature=0, max_tokens=30, ignore_eos=True)


def test_processor():
    (spec,) = llmd_register_logits_processors()
    check_logits_processor(spec.build, PARAMS)


def test_engine(llmd_engine):
    (output,) = llmd_engine().generate("hello", PARAMS, use_tqdm=False)
    assert all(a != b for a, b in itertools.pairwise(output.outputs[0].token_ids))
