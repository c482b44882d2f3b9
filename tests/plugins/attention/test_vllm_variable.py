"""llmd_select_attention_backend by vLLM's variable."""

import pytest

from llmd_plugins.attention.vllm_variable import VARIABLE, llmd_select_attention_backend


@pytest.mark.parametrize(
    ("value", "chosen"),
    [(None, None), ("REFERENCE", "reference"), ("cpu", "cpu"), ("TRITON_ATTN", "triton"), ("FLASHMLA", None)],
)
def test_usable_backend_of_that_name(value, chosen, monkeypatch, caplog):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert llmd_select_attention_backend(["cpu", "reference", "triton"]) == chosen
    assert ("names no attention backend" in caplog.text) is (value == "FLASHMLA")
