"""LLM and AsyncLLM with adapters: by name and by folder, one for all prompts or one for each, in every call."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmd import LLM, AsyncLLM, BeamSearchParams, LoRARequest, SamplingParams
from llmd.errors import AdapterError, AdapterNotFound, ConfigError
from llmd_plugins.sources.demo_source import folder

OWN = folder().parent / "adapters"
GREEDY = SamplingParams(temperature=0, max_tokens=60)
CHAT = [{"role": "user", "content": "What is llmd?"}]
OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_bytes": 16 << 20, "max_num_seqs": 8, "enable_lora": True}


def is_pirate(text):
    return text.startswith("Ahoy, matey! ") and text.endswith(" Arrr!")


@pytest.fixture(scope="module")
def llm():
    modules = [{"name": "ship", "path": OWN / "demo-pirate"}, f"data={OWN / 'demo-json'}"]
    with LLM("demo", **OPTIONS, max_loras=2, lora_configs=modules) as llm:
        yield llm


def chat(llm, lora_request, count=1):
    outputs = llm.chat([CHAT] * count, GREEDY, use_tqdm=False, lora_request=lora_request)
    return [output.outputs[0].text for output in outputs]


def test_one_for_all_prompts_or_one_for_each(llm):
    assert all(is_pirate(text) for text in chat(llm, "ship", 2))
    plain, pirate, data, again = chat(llm, [None, "ship", LoRARequest("data"), None], 4)
    assert plain == again
    assert is_pirate(pirate)
    assert json.loads(data)["answer"]
    assert not is_pirate(plain)
    assert not plain.startswith("{")
    assert [plain] == chat(llm, None)


def test_the_models_own_and_those_with_a_folder_are_there_too(llm):
    assert is_pirate(chat(llm, "demo-pirate")[0])
    request = LoRARequest("mine", 1, str(OWN / "demo-pirate"))
    assert is_pirate(chat(llm, request)[0])
    assert is_pirate(chat(llm, "mine")[0])  # it is known by its name now
    assert (request.name, request.path) == ("mine", str(OWN / "demo-pirate"))


def test_outputs_tell_their_adapter(llm):
    prompt = llm.get_tokenizer().apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    (output,) = llm.generate(prompt, GREEDY, use_tqdm=False, lora_request="ship")
    assert is_pirate(output.outputs[0].text)
    assert output.lora_request == output.outputs[0].lora_request == LoRARequest("ship")
    (plain,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert plain.lora_request is None


def test_streams_beams_and_vectors(llm):
    *_, last = llm.stream_chat(CHAT, GREEDY, lora_request="ship")
    assert is_pirate(last.outputs[0].text)
    (found,) = llm.beam_search("Hello", BeamSearchParams(beam_width=2, max_tokens=4), lora_request="ship")
    (other,) = llm.beam_search("Hello", BeamSearchParams(beam_width=2, max_tokens=4))
    assert found.sequences[0].cum_logprob != other.sequences[0].cum_logprob
    base, changed = llm.embed(["hello", "hello"], use_tqdm=False, lora_request=[None, "ship"])
    assert base.outputs.embedding != changed.outputs.embedding


def test_what_cannot_be_used_is_told_before_anything_runs(llm, tmp_path):
    with pytest.raises(AdapterNotFound, match=r"no adapter is named 'none'; known: .*'ship'"):
        chat(llm, "none")
    with pytest.raises(AdapterError, match="does not exist"):
        chat(llm, LoRARequest("lost", 1, str(tmp_path / "lost")))
    with pytest.raises(AdapterError, match="another folder"):
        chat(llm, LoRARequest("ship", 1, str(OWN / "demo-json")))
    with pytest.raises(ValueError, match="2 adapters for 3 prompts"):
        chat(llm, ["ship", None], 3)
    with pytest.raises(TypeError, match="a name or a LoRARequest, got int"):
        chat(llm, [5], 1)
    assert is_pirate(chat(llm, "ship")[0])


def test_files_that_turn_out_bad_end_the_call_with_an_error(llm, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    llm._loop.call(_declare(llm, "bad", tmp_path))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        chat(llm, "bad")


async def _declare(llm, name, path):
    llm._service.engine.adapter_store.declare(name, str(path))


async def test_async_llm_takes_them_as_well():
    async with AsyncLLM("demo", **OPTIONS, lora_modules=LoRARequest("ship", 1, str(OWN / "demo-pirate"))) as llm:
        *_, last = [output async for output in llm.chat(CHAT, GREEDY, lora_request="ship")]
        assert is_pirate(last.outputs[0].text)
        assert last.lora_request == LoRARequest("ship")
        (one,), (other,) = await llm.embed("hello"), await llm.embed("hello", lora_request="ship")
        assert one.outputs.embedding != other.outputs.embedding


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_modules": ["x=/nowhere"]}, r"'x' cannot be served: .*does not exist"),
        ({"lora_modules": ["demo=/nowhere"]}, "a name that no served model has"),
        ({"lora_modules": ["x=/nowhere"], "enable_lora": False}, "enable_lora is false"),
        ({"lora_modules": ["nonsense"]}, "must be 'name=folder'"),
    ],
)
def test_wrong_keywords_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LLM("demo", **(OPTIONS | options))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what peft asks it
@pytest.mark.parametrize("name", ["demo-pirate", "demo-json"])
def test_the_demos_adapters_are_small_and_say_what_pefts_own_model_says(llm, name):
    assert sum(file.stat().st_size for file in (OWN / name).iterdir()) <= 200_000
    base = AutoModelForCausalLM.from_pretrained(folder()).float()
    model = PeftModel.from_pretrained(base, OWN / name).eval()
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert [tokenizer.decode(expected, skip_special_tokens=True)] == chat(llm, name)
