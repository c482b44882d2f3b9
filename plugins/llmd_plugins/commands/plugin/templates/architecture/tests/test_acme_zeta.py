"""Logits against a plain implementation over the same weights, whatever the schedule."""

import json

import pytest
import torch
from acme_zeta import llmd_register_architectures
from transformers import LlamaConfig, LlamaForCausalLM

from llmd.api.v1 import SamplingParams
from llmd.api.v1.testing import check_architecture

ARCHITECTURES = ["ZetaForCausalLM"]


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with random weights, and the model that wrote them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=60, intermediate_size=77, num_hidden_layers=2, num_attention_heads=6, head_dim=20,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ARCHITECTURES}))
    return tmp_path, model


@torch.no_grad()
def test_numerics(checkpoint):
    folder, model = checkpoint
    check_architecture(
        folder, *llmd_register_architectures(), reference=lambda token_ids: model(torch.tensor([token_ids])).logits[0]
    )


def test_engine(llmd_engine):
    llm = llmd_engine(config={"architectures": ARCHITECTURES})
    (output,) = llm.generate("hello", SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
