"""A tokenizer as GGUF's metadata, from what it does (its tokenizer.json), never from its model's name.

    byte-level BPE       model "gpt2": tokens, merges, and the name under which llama.cpp has the same splitting into words
    BPE with byte fallback (sentencepiece)   model "llama": tokens and scores; a score is minus the rank of the merge that makes it

Whether <bos> and <eos> are added is tried out. A way of splitting that llama.cpp does not have is refused: the tokens would differ.
Source: GGUF's keys by the `gguf` package; the splittings by the regular expressions that llama.cpp documents under each name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import UserError
from ..support.files import read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTINGS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_WORDS % "{1,3}",), True): "llama-bpe",
    ((_WORDS % "{1,3}",), False): "smaug-bpe",
    ((_WORDS % "",), False): "qwen2",
    ((_CASES,), True): "tekken",
}
"""(steps, whole words in the vocabulary skip the merges) → llama.cpp's name. "words" is byte-level BPE's own regular expression."""


def add_tokenizer(writer, tokenizer, vocab_size: int, folder: Path) -> None:
    """Write tokens, merges or scores, special tokens and the chat template.

    Args:
        vocab_size: rows of the embedding; rows without a token are written as unused.
        folder: of the model, for the further ends of a text in its generation_config.json.

    Raises:
        UserError: a kind of tokenizer or a splitting that llama.cpp does not have, or more tokens than rows.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise UserError(f"the tokenizer of {folder} has no fast form (tokenizer.json), from which GGUF's is made; save it with one")
    described = json.loads(inner.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer of {folder} is of the kind {model['type']}; GGUF is written for BPE")
    pieces = _bytes_fall_back(writer, described) if model.get("byte_fallback") else _byte_level(writer, described, folder)
    tokens, types = _tokens(described, vocab_size, folder)
    writer.add_token_list(tokens)
    writer.add_token_types([int(t) for t in types])
    if pieces is not None:
        lowest = -float(len(pieces) + 1)
        writer.add_token_scores([pieces.get(token, lowest) for token in tokens])
    _special(writer, tokenizer, folder)
    if tokenizer.chat_template:
        writer.add_chat_template(_templates(tokenizer.chat_template))


def _byte_level(writer, described: dict, folder: Path) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(described, str(folder)))
    writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(described)])


def _bytes_fall_back(writer, described: dict) -> dict[str, float]:
    """{token: score}: the first merge that makes a token has the best rank, and the best score is merged first."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    steps = _steps(described["normalizer"], "normalizers") + _steps(described["pre_tokenizer"], "pretokenizers")
    scheme = {s["type"]: s.get("prepend_scheme", "always") for s in steps}
    writer.add_add_space_prefix("Prepend" in scheme or scheme.get("Metaspace", "never") != "never")
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(_merges(described)):
        scores.setdefault(left + right, -float(rank))
    return scores


def splitting(described: dict, where: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text into words.

    Raises:
        UserError: it has none.
    """
    steps = [_step(step) for step in _steps(described["pre_tokenizer"], "pretokenizers")]
    normal = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    key = tuple(step for step in steps if step), bool(described["model"].get("ignore_merges"))
    if key not in SPLITTINGS or any(kind != "NFC" for kind in normal):
        shown = ", ".join([*normal, *(step or "" for step in key[0])])[:120] or "nothing"
        raise UserError(f"{where}: its tokenizer prepares text by {shown}, which llama.cpp has under no name; take transformers")
    return SPLITTINGS[key]


def _step(step: dict) -> str | None:
    """What one step splits by; None: it only maps bytes."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    pattern = step.get("pattern", {}).get("Regex") if kind == "Split" else None
    whole = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    return pattern if pattern and whole else kind


def _steps(part: dict | None, inner: str) -> list[dict]:
    if part is None:
        return []
    return [step for p in part[inner] for step in _steps(p, inner)] if part["type"] == "Sequence" else [part]


def _merges(described: dict) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in described["model"]["merges"]]


def _tokens(described: dict, vocab_size: int, folder: Path) -> tuple[list[str], list]:
    """(tokens, types) of every row of the embedding."""
    from gguf import TokenType

    model = described["model"]
    vocabulary = {i: token for token, i in model["vocab"].items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    if (highest := max([*vocabulary, *added])) >= vocab_size:
        raise UserError(f"{folder}: its tokenizer has token {highest}, its embedding {vocab_size} rows; resize the embedding")
    tokens, types = [], []
    for i in range(vocab_size):
        token = added[i]["content"] if i in added else vocabulary.get(i, f"[PAD{i}]")
        if i in added:
            kind = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        elif i not in vocabulary:
            kind = TokenType.UNUSED
        else:
            is_byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        if token == model.get("unk_token") and model.get("byte_fallback"):
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _special(writer, tokenizer, folder: Path) -> None:
    """Ids of special tokens; which are added in front and behind; a second end of text (of a turn) where the model has one."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    ends = _ends(folder)
    ids["eot"] = next((i for i in ends if i != ids["eos"]), None)
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = len(whole) - len(plain) if whole[-len(plain) :] == plain else next(i for i, t in enumerate(whole) if t == plain[0])
    writer.add_add_bos_token(start > 0)
    writer.add_add_eos_token(len(whole) > start + len(plain))


def _ends(folder: Path) -> list[int]:
    """The ids that end a text, by generation_config.json."""
    path = folder / "generation_config.json"
    ends = read_json(path, "it belongs to the model folder").get("eos_token_id") if path.is_file() else None
    return [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]


def _templates(template):
    return template if isinstance(template, str) else [{"name": name, "template": text} for name, text in template.items()]
