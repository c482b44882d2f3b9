"""sentence-transformers' files: what they say, and what is refused by name."""

import pytest
from model.tiny_encoders import write_sentence_files

from llmd.errors import InvalidRequest, ModelError
from llmd.text.pooling import PoolingDefaults, read_pooling


def test_a_folder_without_them(tmp_path):
    assert read_pooling(tmp_path) == PoolingDefaults(pooling=None, normalize=True)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 8, "include_prompt": True}, "last"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_poolings(tmp_path, config, pooling):
    assert read_pooling(write_sentence_files(tmp_path, pooling=config)).pooling == pooling


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "1_Pooling/config.json: pooling must be one of .* got weightedmean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "got cls and max"),
        ({"pooling_mode_cls_token": False}, "got none"),
    ],
)
def test_poolings_that_are_refused(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        read_pooling(write_sentence_files(tmp_path, pooling=config))


def test_modules(tmp_path):
    assert not read_pooling(write_sentence_files(tmp_path, normalize=False)).normalize
    with pytest.raises(ModelError, match=r"modules.json: the module 'Dense' \(3_Dense\) is not served"):
        read_pooling(write_sentence_files(tmp_path, kinds=["Dense"]))
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="must be a list"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "x.Pooling", "path": "../elsewhere"}]')
    with pytest.raises(ModelError, match="must lie within"):
        read_pooling(tmp_path)


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
