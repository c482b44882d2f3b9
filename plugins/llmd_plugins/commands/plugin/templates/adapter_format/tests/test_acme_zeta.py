"""The format by the kit, and what it refuses."""

import json

import pytest
import torch
from acme_zeta.files import ZetaFormat
from safetensors.torch import save_file

from llmd.api.v1 import AdapterError, BaseModule
from llmd.api.v1.testing import check_adapter_format

MODULES = {"model.layers.0.self_attn.q_proj": BaseModule("linear", 12, 20)}


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 4."""
    (tmp_path / "zeta.json").write_text(json.dumps({"scaling": 2.0}))
    name = "layers.0.self_attn.q_proj"
    save_file({f"{name}.a": torch.randn(4, 12), f"{name}.b": torch.randn(20, 4)}, tmp_path / "zeta.safetensors")
    return tmp_path


def test_format(folder):
    check_adapter_format(ZetaFormat(), folder, MODULES, rank=4)


@pytest.mark.parametrize("text", ["", "{}", '{"scaling": "much"}'])
def test_broken_settings(folder, text):
    (folder / "zeta.json").write_text(text)
    with pytest.raises(AdapterError, match=r"zeta\.json: scaling"):
        ZetaFormat().check(folder, MODULES, 8)


def test_broken_tensors(folder):
    (folder / "zeta.safetensors").write_bytes(b"no header")
    with pytest.raises(AdapterError, match="cannot be read"):
        ZetaFormat().load(folder, MODULES, 8)
