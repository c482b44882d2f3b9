"""sentence-transformers' files: what they say, and what is refused by name."""

import pytest
from model.tiny_encoders import write_sentence_files

from llmd.errors import InvalidRequest, ModelError
from llmd.text.pooling import PoolingDefaults, read_pooling


def test_a_folder_without_them(tmp_path):
    assert read_pooling(tmp_path) == PoolingDefaults(pooling=None, normalize=True)


def test_modules(tmp_path):
    assert not read_pooling(write_sentence_files(tmp_path, normalize=False)).normalize
    assert read_pooling(write_sentence_files(tmp_path, pooling={"pooling_mode": "weightedmean"})).pooling == "weightedmean"


def test_what_config_json_says(tmp_path):
    (tmp_path / "config.json").write_text('{"matryoshka_dimensions": [32, 64]}')
    found = read_pooling(tmp_path)
    assert (found.is_matryoshka, found.matryoshka_dimensions, found.is_yes_no_reranker) == (True, (32, 64), False)
    over = {"matryoshka_dimensions": None, "is_matryoshka": True, "is_original_qwen3_reranker": True}
    found = read_pooling(tmp_path, over)
    assert (found.is_matryoshka, found.matryoshka_dimensions, found.is_yes_no_reranker) == (True, (), True)
    with pytest.raises(ModelError, match="matryoshka_dimensions must be a list of lengths, got 3"):
        read_pooling(tmp_path, {"matryoshka_dimensions": 3})


def test_prompts_and_lengths(tmp_path):
    write_sentence_files(
        tmp_path,
        prompts={"query": "find: ", "document": ""},
        default_prompt="query",
        sentence={"max_seq_length": 128, "do_lower_case": True},
    )
    found = read_pooling(tmp_path)
    assert (found.max_length, found.is_lower_case) == (128, True)
    assert [found.prompt(name) for name in (None, "query", "document")] == ["find: ", "find: ", ""]
    with pytest.raises(InvalidRequest, match=r"prompt_name must be one of .*'document', 'query'.*, got 'other'"):
        found.prompt("other")
    write_sentence_files(tmp_path, prompts={"query": "find: "}, default_prompt="document")
    with pytest.raises(ModelError, match="default_prompt_name 'document' is no prompt"):
        read_pooling(tmp_path)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "mean", "include_prompt": False}, prompts={"query": "find: "})
    with pytest.raises(ModelError, match="include_prompt must be true"):
        read_pooling(tmp_path)
