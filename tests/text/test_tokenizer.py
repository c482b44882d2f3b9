"""Our tokenizer against transformers over every kind; missing and broken files; long encodes off the loop."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading

import pytest
from made_tokenizers import KINDS, write_folder

from llmd.errors import InvalidRequest, ModelError, Overloaded
from llmd.text import tokenizer as module
from llmd.text.tokenizer import Tokenizer

TEXTS = [
    "Hello world, this is it.",
    "  two  spaces and\ttabs\n\nnewlines ",
    "Grüße 😀 日本語 👩‍👩‍👧‍👦 don't n't ▁▁ x",
    "<|im_start|>user<|im_end|> <s></s> [CLS] <tool é> <|late|> </s>",
    "",
    "zażółć 𝔘𝔫𝔦 \u0000 \x7f",
]


@pytest.fixture(scope="module")
def references(folders):
    from transformers import PreTrainedTokenizerFast

    return {kind: PreTrainedTokenizerFast.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [True, False])
def test_encodes_as_transformers(kind, special, tokenizers_made, references):
    for text in TEXTS:
        expected = references[kind].encode(text, add_special_tokens=special)
        assert tokenizers_made[kind].encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_decodes_as_transformers(kind, skip, tokenizers_made, references):
    ours, theirs = tokenizers_made[kind], references[kind]
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_knows_the_special_tokens(kind, tokenizers_made, references):
    ours, theirs = tokenizers_made[kind], references[kind]
    assert ours.special_ids == set(theirs.all_special_ids) | {
        token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens == theirs.special_tokens_map


def test_ids_outside_the_vocabulary_are_silent(tokenizers_made):
    ours = tokenizers_made["byte_level"]
    ids = ours.encode("Hello")
    assert ours.decode([*ids, 5000, 1 << 30]) == "Hello"
    assert ours.token_text(5000) == ""


def test_a_model_may_have_fewer_rows_than_the_tokenizer_has_tokens(tokenizers_made):
    ours = tokenizers_made["byte_level"]
    assert ours.encode("<|late|>") == [ours.vocab_size - 1]  # the caller checks against the model's vocabulary


def test_token_text_keeps_the_space_and_bytes(tokenizers_made):
    ours = tokenizers_made["llama"]
    assert ours.token_text(ours.encode(" world")[-1])
    newline = ours.token_to_id("<0x0A>")
    assert ours.token_bytes(newline) == b"\n"
    half = ours.token_to_id("<0xF0>")
    assert ours.token_bytes(half) == b"\xf0"
    assert ours.token_text(half) == "\ufffd"
    space = ours.token_to_id("▁")
    assert ours.token_bytes(space) == b" "


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_join_to_the_text(kind, tokenizers_made):
    if kind == "end_of_word":
        pytest.skip("its tokens have no text of their own")
    ours = tokenizers_made[kind]
    ids = ours.encode("the lazy dog", add_special_tokens=False)
    joined = b"".join(map(ours.token_bytes, ids)).decode()
    assert joined.strip() == ours.decode(ids).strip()


def test_legacy_special_tokens_map(tmp_path):
    folder = write_folder("gemma", tmp_path / "model")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<unk>"}}))
    assert Tokenizer.from_folder(folder).eos_token_id == 0


def test_truncation_in_the_file_is_not_for_us(tmp_path):
    folder = write_folder("byte_level", tmp_path / "model")
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert len(Tokenizer.from_folder(folder).encode("Hello world, this is it")) > 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer.json": "{"}, "model/tokenizer.json is broken"),
        ({"tokenizer.json": '{"model": {}}'}, "tokenizer.json is broken"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{,"}, "model/tokenizer_config.json cannot be read"),
        ({"tokenizer_config.json": "[]"}, "must be a JSON object"),
        ({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'}, "trust_remote_code"),
        ({"tokenizer.model": "not sentencepiece", "config.json": '{"model_type": "llama"}'}, "add a tokenizer.json"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_broken_folders_are_named(tmp_path, files, words):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_folder(folder)
    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_folders_without_tokenizer_json_go_through_transformers(tmp_path, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with caplog.at_level("INFO"):
        ours = Tokenizer.from_folder(folder)
    assert "transformers" in caplog.text
    assert ours.encode("hello worlds") == [2, 5, 6, 7, 3]
    assert ours.special_tokens["cls_token"] == "[CLS]"


def test_slow_tokenizers_work_through_the_same_methods(tokenizers_made, references):
    class Slow:
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self.inner, name)

    ours = Tokenizer(module.SlowBackend(Slow(references["llama"])), {"eos_token": "</s>"}, {})
    fast = tokenizers_made["llama"]
    ids = fast.encode(TEXTS[2])
    assert ours.encode(TEXTS[2]) == ids
    detokenizer = ours.detokenizer()
    text = "".join(detokenizer.feed([token_id]) for token_id in ids) + detokenizer.finish()
    assert text == fast.decode(ids)
    assert ours.token_bytes(fast.token_to_id("</s>")) == b"</s>"
    assert ours.max_text_length(10) > 10
    assert ours.vocab_size == fast.vocab_size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Hello world, and more", "naïve 日本語 🙂🙂", ""])
def test_a_prefix_of_so_many_tokens(kind, text, tokenizers_made):
    tokenizer = tokenizers_made[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    lengths = [len(tokenizer.prefix(text, count)) for count in range(len(ids) + 2)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert all(text.startswith(tokenizer.prefix(text, count)) for count in range(len(ids)))
    assert tokenizer.prefix(text, len(ids)) == tokenizer.prefix(text, len(ids) + 1) == text


def test_lone_surrogates_are_refused(tokenizers_made):
    with pytest.raises(InvalidRequest, match="character 1 is half of a surrogate pair"):
        tokenizers_made["byte_level"].encode("a\ud800b")


async def test_long_encodes_leave_the_loop(tokenizers_made, monkeypatch):
    ours = tokenizers_made["byte_level"]
    seen = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *a, **k: seen.append(threading.current_thread()) or encode(*a, **k))
    long = "word " * 1000
    assert await ours.encode_async("short") == encode(ours, "short")
    assert await ours.encode_async(long) == encode(ours, long)
    assert seen[0] is threading.main_thread()
    assert seen[1] is not threading.main_thread()
    ours.close()


async def test_the_loop_goes_on_while_a_long_text_is_encoded(tokenizers_made):
    ours = tokenizers_made["byte_level"]
    long = " ".join(f"word{number}" for number in range(100_000))
    encoding = asyncio.ensure_future(ours.encode_async(long))
    ticks = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert ticks > 20  # the GIL is free meanwhile
    assert len(encoding.result()) > 100_000
    ours.close()


async def test_waiting_encodes_are_bounded(tokenizers_made, monkeypatch):
    ours = tokenizers_made["byte_level"]
    monkeypatch.setattr(module, "MAX_WAITING_ENCODES", 3)
    results = await asyncio.gather(*(ours.encode_async("word " * 1000) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 2
    assert ours._num_waiting == 0
    ours.close()


def test_text_too_long_is_known_without_encoding(tokenizers_made):
    ours = tokenizers_made["byte_level"]
    text = "the quick brown fox" * 50
    assert len(text) <= ours.max_text_length(len(ours.encode(text)))


def test_no_transformers_for_tokenizer_json(folders):
    code = (
        "import sys; from llmd.text.tokenizer import Tokenizer; from llmd.text.chat_template import ChatTemplate\n"
        f"Tokenizer.from_folder({str(folders['byte_level'])!r}).encode('hi')\n"
        "print([name for name in ('transformers', 'torch', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
