"""Text as tokens come: joined, the pieces are the tokenizer's own text; stops are found across tokens and never shown."""

import random

import pytest
from conftest import small_tokenizer

from doratune.serving.words import BROKEN, Words


def bytes_by_fallback():
    """A BPE over ▁words whose unknown characters are bytes, as Llama's and Gemma's: its text begins without the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁the", "▁answer", "th", "e", "▁is", ".", "t", "h", "a", "n", "s", "w", "r", "i"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": small_tokenizer(), "byte fallback": bytes_by_fallback()}


def pieces(tokenizer, ids, stops=()):
    words = Words(tokenizer, stops)
    parts = []
    for token in ids:
        parts.append(words.add(token))
        if words.stopped:
            break
    return [*parts, words.close()], words


@pytest.mark.parametrize("name", TOKENIZERS)
def test_joined_pieces_are_the_whole_text(name):
    """Texts in several scripts, and tokens at random: half characters, bytes that are none, special tokens."""
    tokenizer, generator = TOKENIZERS[name], random.Random(0)
    texts = ["the answer is true", "größer als ½", "日本語のテキスト", "🙂🏳️‍🌈 e\u0301", " \n\t x", "\ufffd literally", ""]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows += [[token for row in generator.choices(rows, k=4) for token in row] for _ in range(50)]
    if name == "byte-level":
        rows += [[generator.randrange(len(tokenizer)) for _ in range(40)] for _ in range(150)]
    for ids in rows:
        parts, _ = pieces(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_half_character_is_shown(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("größer 日本 🙂", add_special_tokens=False)["input_ids"]
    parts, _ = pieces(tokenizer, ids)
    assert len(ids) > len("größer 日本 🙂") and not any(BROKEN in part for part in parts)
    assert pieces(tokenizer, ids[:-1])[0][-1].endswith(BROKEN)  # cut within a character: said at the end, not before


def first_complete(tokenizer, ids, stops):
    """Where the text ends: in front of the first stop that some number of tokens hold whole."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end]).rstrip(BROKEN)
        if places := [place for stop in stops if (place := text.find(stop)) >= 0]:
            return min(places)
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stops_at_every_place(name):
    """Any piece of a text as a stop, several stops, those that end or never come: the text up to the first."""
    tokenizer, generator = TOKENIZERS[name], random.Random(1)
    text = "the answer is 日本 the answer was the thing"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(300):
        stops = []
        for _ in range(generator.randint(1, 3)):
            start = generator.randrange(len(text))
            stops.append(text[start : start + generator.randint(1, 6)] + generator.choice(["", "", "", "?"]))
        parts, words = pieces(tokenizer, ids, stops)
        want = first_complete(tokenizer, ids, stops)
        assert "".join(parts) == text[:want] and words.stopped == any(stop in text for stop in stops), stops
        seen = ""
        for part in parts:  # what was shown is never taken back
            seen += part
            assert text.startswith(seen)
