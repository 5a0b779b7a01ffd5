"""Tiny BARTs as folders with their tokenizers: what VL-BART's tests begin with."""

import torch
import transformers
from pictures import words_tokenizer

WIDTH = 32


def tiny_config(tokenizer, **more):
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 96, "dropout": 0.0}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return transformers.BartConfig(vocab_size=len(tokenizer), **sizes | ends | more)


def tiny_bart(folder, seed=0, **more):
    """The folder of a BART that reads text alone, with a byte-level tokenizer."""
    tokenizer = words_tokenizer([])
    torch.manual_seed(seed)
    model = transformers.BartForConditionalGeneration(tiny_config(tokenizer, **more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
