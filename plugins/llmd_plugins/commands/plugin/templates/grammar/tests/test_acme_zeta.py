"""The grammar by the kit, and in the engine."""

import json

from acme_zeta import llmd_register_grammars

from llmd.api.v1 import SamplingParams, StructuredOutputsParams
from llmd.api.v1.testing import check_grammar

CHOICES = ["yes", "yes, please", "no", "grüß Gott"]


def test_grammar():
    (spec,) = llmd_register_grammars()
    bad = ["", "{}", "[]", "[1]", json.dumps(["x" * 20_000])]
    check_grammar(
        spec.build, "choice", json.dumps(CHOICES), accepts=CHOICES, rejects=["maybe", "ye", "gru"], bad_sources=bad
    )


def test_engine(llmd_engine):
    llm = llmd_engine(structured_outputs_config={"backend": "zeta"})
    params = SamplingParams(max_tokens=30, structured_outputs=StructuredOutputsParams(choice=tuple(CHOICES)))
    outputs = llm.generate(["hello"] * 3, params, use_tqdm=False)
    assert all(output.outputs[0].text in CHOICES for output in outputs)
