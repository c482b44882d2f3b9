"""Text of thirty scripts and emoji as it streams: whatever the tokens and the cuts, the pieces are the whole."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest
from made_tokenizers import BYTE_TOKEN, has_mixed_byte_run

from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason, SequenceDelta
from llmd.text.output import OutputProcessor

SCRIPTS = {
    "Latin": "Zażółć gęślą jaźń, naïve façade, Þórr",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Cyrillic": "Съешь же ещё этих мягких французских булок",
    "Armenian": "Բել դղյակի ձախ ժամն օֆ",
    "Georgian": "გთხოვთ ახლავე გაიაროთ",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Arabic": "نص حكيم له سر قاطع",
    "Syriac": "ܒܪܫܝܬ ܐܝܬܘܗܝ ܗܘܐ",
    "Thaana": "ދިވެހިރާއްޖެ",
    "N'Ko": "ߒߞߏ ߛߓߍߛߎ߲",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट",
    "Bengali": "আমি বাংলায় গান গাই",
    "Gurmukhi": "ਪੰਜਾਬੀ ਵਿੱਚ ਲਿਖਤ",
    "Gujarati": "ગુજરાતી લખાણ",
    "Oriya": "ଓଡ଼ିଆ ଲେଖା",
    "Tamil": "யாமறிந்த மொழிகளிலே",
    "Telugu": "తెలుగు వ్రాత",
    "Kannada": "ಕನ್ನಡ ಬರಹ",
    "Malayalam": "മലയാളം എഴുത്ത്",
    "Sinhala": "සිංහල අකුරු",
    "Thai": "เป็นมนุษย์สุดประเสริฐ",
    "Lao": "ພາສາລາວ",
    "Tibetan": "བོད་ཡིག་གི་སྐད",
    "Myanmar": "မြန်မာစာ",
    "Khmer": "អក្សរខ្មែរ",
    "Ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ",
    "Cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "Han": "漢字與汉字，𠮷野家與𪚥",
    "Hiragana and Katakana": "いろはにほへと チリヌルヲ",
    "Hangul": "키스의 고유조건은 입술끼리",
    "Gothic": "𐌲𐌿𐍄𐌹𐍃𐌺",
}
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪🇯🇵", "👍🏽", "❤️‍🔥", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☝🏿", "1️⃣", "e\u0301", "a\u200d\ufe0f"]
SAMPLES = [*SCRIPTS.values(), *EMOJI, "plain words ", "\n\n\t", "  "]
WHOLE = ("byte_level", "llama", "gemma")  # whose tokens cover every byte, so that any text goes both ways
KINDS = (*WHOLE, "unigram", "word_piece")
NUM_SEQUENCES = 5000
INVALID = re.compile("[\udc80-\udcff]")  # bytes that surrogateescape could not read


def pieces_of(tokenizer, token_ids, rng, **params):
    """What a reader gets of these tokens, a few a step, when it looks now and then."""
    outputs = OutputProcessor(tokenizer, max_buffer_bytes=1 << 20)
    prompt = Prompt((min(tokenizer.special_ids),))
    stream = outputs.open(Request(request_id="r", prompt=prompt, params=SamplingParams(max_tokens=None, **params)))
    pieces, start = [], 0
    while start < len(token_ids):
        end = min(len(token_ids), start + rng.choice((1, 1, 1, 2, 5)))
        reason = FinishReason.LENGTH if end == len(token_ids) else None
        outputs.publish([SequenceDelta("r", 0, tuple(token_ids[start:end]), finish_reason=reason)])
        if reason or rng.random() < 0.7:
            pieces += [delta.text for delta in stream.take()]
        start = end
    assert stream.is_finished
    return pieces


def whole_of(tokenizer, token_ids, skip_special_tokens):
    """The same by the full decode, behind the same prompt."""
    prompt = [min(tokenizer.special_ids)]
    before = tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
    return tokenizer.decode([*prompt, *token_ids], skip_special_tokens=skip_special_tokens)[len(before) :]


def test_there_are_thirty_scripts():
    named = {name: {unicodedata.name(c, "").split(" ")[0] for c in text} for name, text in SCRIPTS.items()}
    assert len(named) >= 30
    special = {"N'Ko": "NKO", "Han": "CJK", "Hiragana and Katakana": "HIRAGANA"}
    assert all(special.get(name, name.upper()) in found for name, found in named.items())


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens(kind, tokenizers_made):
    """Most are no text at all: half characters, bytes that never become one, special tokens between them."""
    tokenizer, rng = tokenizers_made[kind], random.Random(1)
    for _ in range(NUM_SEQUENCES // len(KINDS)):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 40))]
        skip = rng.random() < 0.5
        text = "".join(pieces_of(tokenizer, ids, rng, skip_special_tokens=skip))
        if has_mixed_byte_run(tokenizer, ids, skip):  # characters that the full decode would take back
            assert text == bytes_of(kind, tokenizer, ids, skip)
        else:
            assert text == whole_of(tokenizer, ids, skip)


def bytes_of(kind, tokenizer, token_ids, skip_special_tokens):
    """By the definition of byte fallback, each byte that belongs to no character as U+FFFD."""
    runs = [b""]
    for token_id in token_ids:
        if not (skip_special_tokens and token_id in tokenizer.special_ids):
            token = tokenizer._backend.id_to_token(token_id)
            if match := BYTE_TOKEN.fullmatch(token):
                runs[-1] += bytes([int(match[1], 16)])
            else:
                runs += [token.replace("▁", " ").encode(), b""]
    text = "".join(INVALID.sub("\ufffd", run.decode(errors="surrogateescape")) for run in runs)
    return text.removeprefix(" ") if kind == "llama" and skip_special_tokens else text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SCRIPTS, "Emoji"])
def test_each_script(kind, name, tokenizers_made):
    text = SCRIPTS.get(name) or " ".join(EMOJI)
    check_text(tokenizers_made[kind], kind, text, random.Random(2))


@pytest.mark.parametrize("kind", KINDS)
def test_random_mixtures(kind, tokenizers_made):
    rng = random.Random(3)
    for _ in range(NUM_SEQUENCES // len(KINDS)):
        check_text(tokenizers_made[kind], kind, "x" + "".join(rng.choices(SAMPLES, k=rng.randint(1, 3))), rng)


def check_text(tokenizer, kind, text, rng):
    """Of real text no piece ever shows half a character."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids, rng)
    assert "".join(pieces) == whole_of(tokenizer, ids, True)
    assert not any("\ufffd" in piece for piece in pieces)
    if kind in WHOLE:
        assert "".join(pieces) == text
