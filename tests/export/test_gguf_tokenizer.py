"""Tokenizers in GGUF: llama.cpp splits text into the same tokens, kind by kind; others are refused. Modelfiles: the same chat."""

import llama_cpp
import pytest
import torch
from engines import engine
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from doratune import UserError
from doratune.export import ollama
from doratune.export.gguf import export_gguf
from doratune.export.tokenizer import SPLITTINGS

TEXTS = (
    "Hello  world 12345 isn't it?\n\n  WE'LL see\tHelloWorld's",
    "Éé naïve 日本語 🚀 x2 — «quoted» 3.14",
    "<mark>tuned</s> the end ",
)
CORPUS = ["Hello world, the tuned words isn't we'll see 12345 3.14 HelloWorld's naïve Éé", "a quick brown fox 2024 日本語"] * 20


def byte_level(steps, ignore_merges=False):
    """A byte-level BPE that splits text by these steps: a regular expression, "digits" or "words"."""
    kinds = {"digits": pre_tokenizers.Digits(individual_digits=True), "words": pre_tokenizers.ByteLevel(add_prefix_space=False)}
    inner = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = [kinds[step] if step in kinds else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    if "words" not in steps:
        split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    return inner


def byte_fallback(prefix: bool):
    """A BPE as sentencepiece makes it: ▁ for spaces, bytes for unknown letters."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(steps)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only: no merges over spaces
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    inner.pre_tokenizer = None
    return inner


KINDS = {name: (steps, merges) for (steps, merges), name in SPLITTINGS.items()}


def tokenizer_of(kind: str, bos: bool = False) -> PreTrainedTokenizerFast:
    inner = byte_level(*KINDS[kind]) if kind in KINDS else byte_fallback(prefix=kind == "sentencepiece")
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", inner.token_to_id("<s>"))])
    inner.add_tokens([AddedToken("<mark>", normalized=False)])
    unknown = {"unk_token": "<unk>"} if kind not in KINDS else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **unknown)


def exported(tokenizer, folder, rows=448):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return export_gguf(str(folder / "base"), None, folder / "out").file


def fields(file) -> dict:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece", "sentencepiece without prefix"])
@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_makes_the_same_tokens(kind, bos, tmp_path):
    engine("xllamacpp")
    tokenizer = tokenizer_of(kind, bos)
    file = exported(tokenizer, tmp_path)
    requests = [("/tokenize", {"content": text, "add_special": True, "parse_special": True}) for text in TEXTS]
    assert [answer["tokens"] for answer in llama_cpp.ask(file, *requests)] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece", "sentencepiece without prefix"])
def test_metadata(kind, tmp_path):
    tokenizer = tokenizer_of(kind, bos=True)
    data = fields(exported(tokenizer, tmp_path))
    tokens, types = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 448 and tokens[447] == "[PAD447]" and types[447] == 5
    assert types[tokenizer.convert_tokens_to_ids("<mark>")] == 4 and types[tokenizer.convert_tokens_to_ids("</s>")] == 3
    assert data["tokenizer.ggml.add_bos_token"] and not data["tokenizer.ggml.add_eos_token"]
    assert data["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert data["tokenizer.ggml.pre"] == (kind if kind in KINDS else "default")
    if kind in KINDS:
        assert len(data["tokenizer.ggml.merges"]) > 50
    else:
        assert data["tokenizer.ggml.add_space_prefix"] == (kind == "sentencepiece")
        assert types[tokenizer.convert_tokens_to_ids("<0x0A>")] in (3, 6)


def test_transformers_reads_the_tokenizer_back(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of("gpt-2")
    file = exported(tokenizer, tmp_path)
    back = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert all(back(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS[:2])


@pytest.mark.parametrize("bad", ["regex", "lower case", "unigram", "word piece", "merges flag", "rows"])
def test_what_llama_cpp_has_not_is_refused(bad, tmp_path):
    inner, rows = byte_level(("words",)), 448
    if bad == "regex":
        inner = byte_level((r"\w+|\s+",))
    elif bad == "lower case":
        inner.normalizer = normalizers.Lowercase()
    elif bad == "unigram":
        inner = Tokenizer(models.Unigram([("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    elif bad == "word piece":
        inner = Tokenizer(models.WordPiece({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<pad>"))
    elif bad == "merges flag":
        inner = byte_level(("words",), ignore_merges=True)
    else:
        rows = 300
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    with pytest.raises(UserError, match="tokenizer"):
        exported(tokenizer, tmp_path, rows)
    assert not (tmp_path / "out").exists()


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.</s>\n{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<h>{{ m['role'] }}</h>\n\n{{ m['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
NESTED = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set r = messages[1:] %}{% else %}{% set s = '' %}{% set r = messages %}{% endif %}{% for m in r %}"
    "{% if m['role'] == 'user' %}"
    "[INST] {{ s if loop.first else '' }}{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "system", "default"),
    [(CHATML, True, None), (DEFAULT + CHATML, True, "You help."), (GEMMA, False, None), (LLAMA3, True, None)],
)
def test_a_modelfile_renders_what_the_tokenizer_renders(template, system, default):
    tokenizer = tokenizer_of("gpt-2", bos="bos_token" in template)
    tokenizer.chat_template = template
    turns = ollama.turns_of(tokenizer)
    assert (turns.system is not None) == system and turns.default_system == default
    questions = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": " C"}]
    assert turns.render(questions) == ollama.rendered(tokenizer, [(m["role"], m["content"]) for m in questions])
    text = ollama.modelfile(tokenizer, "x.gguf")
    assert text.startswith("FROM ./x.gguf\n") and turns.template() in text
    assert ("takes no system prompt" in text) != system and (f'SYSTEM """{default}"""' in text) == (default is not None)


def test_a_template_that_is_not_made_of_turns_is_left_to_the_file():
    tokenizer = tokenizer_of("gpt-2")
    tokenizer.chat_template = NESTED
    assert ollama.turns_of(tokenizer) is None
    assert "TEMPLATE" not in ollama.modelfile(tokenizer, "x.gguf") and "PARAMETER stop" in ollama.modelfile(tokenizer, "x.gguf")
