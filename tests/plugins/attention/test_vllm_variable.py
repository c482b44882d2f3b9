"""llmd_select_attention_backend by vLLM's variable."""

import pytest

from llmd_plugins.attention.vllm_variable import VARIABLE, llmd_select_attention_backend


def test_flash_attn_is_the_latest_release_that_is_usable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "FLASH_ATTN")
    assert llmd_select_attention_backend(["triton", "flash_attn", "flash_attn_3"]) == "flash_attn_3"
    assert llmd_select_attention_backend(["triton", "flash_attn", "flashinfer"]) == "flash_attn"
    monkeypatch.setenv(VARIABLE, "FLASHINFER")
    assert llmd_select_attention_backend(["triton", "flash_attn", "flashinfer"]) == "flashinfer"


@pytest.mark.parametrize(
    ("value", "chosen"),
    [(None, None), ("REFERENCE", "reference"), ("cpu", "cpu"), ("TRITON_ATTN", "triton"), ("FLASHMLA", None)],
)
def test_usable_backend_of_that_name(value, chosen, monkeypatch, caplog):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert llmd_select_attention_backend(["cpu", "reference", "triton"]) == chosen
    assert ("names no attention backend" in caplog.text) is (value == "FLASHMLA")
