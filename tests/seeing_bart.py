"""Tiny BARTs as folders with their tokenizers, and items of several tasks about plain colours: what VL-BART's tests begin with."""

import json

import numpy as np
import torch
import transformers
from pictures import words_tokenizer
from PIL import Image

WIDTH = 32
COLOURS = {"red": (230, 20, 10), "green": (10, 220, 10), "blue": (20, 20, 230)}


def tiny_config(tokenizer, **more):
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 96, "dropout": 0.0}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return transformers.BartConfig(vocab_size=len(tokenizer), **sizes | ends | more)


def tiny_bart(folder, seed=0, steps=0, **more):
    """The folder of a BART that reads text alone, with a byte-level tokenizer.

    steps: of a pretraining, after which it writes what it reads, and so answers when it is told them."""
    tokenizer = words_tokenizer([])
    torch.manual_seed(seed)
    model = transformers.BartForConditionalGeneration(tiny_config(tokenizer, **more))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [text for label in COLOURS for text in (label, f"a {label} picture", f"{label} alone", "true", "false")]
    ids = tokenizer([f"{text}</s>" for text in texts], return_tensors="pt", padding=True)
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    for _ in range(steps):
        loss = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures(folder, each=4, side=20):
    """folder/COLOUR_N.png, noisy; the names by colour."""
    generator, names = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for label, colour in COLOURS.items():
        for n in range(each):
            pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}_{n}.png")
            names.setdefault(label, []).append(f"{label}_{n}.png")
    return names


def seen_data(folder, each=4):
    """A file of items of four tasks about plain colours: a question, two images, a caption, a film of two frames."""
    names, items = pictures(folder, each), []
    for label, files in names.items():
        for n, file in enumerate(files):
            other = names["red" if n % 2 else label][(n + 1) % each]
            items.append({"task": "vqa", "image": file, "question": "What colour is it?", "answer": label})
            same = "true" if other.split("_")[0] == label else "false"
            items.append({"task": "nlvr", "images": [file, other], "question": "the same colour", "answer": same})
            items.append({"task": "caption", "image": file, "answers": [f"a {label} picture", f"{label} alone"]})
            film = folder / f"film_{label}_{n}"
            film.mkdir(exist_ok=True)
            for k, frame in enumerate((file, names["blue"][n])):
                (film / f"{k}.png").write_bytes((folder / frame).read_bytes())
            items.append({"task": "tvqa", "video": film.name, "question": "What is first?", "answer": label, "context": "words"})
    path = folder / "mine.json"
    path.write_text(json.dumps(items))
    return path


def train_words(base, tower, data, output, **settings):
    """The words of a short `doratune train`."""
    usual = {"objective": "vl_bart", "model": base, "image_tower": tower, "data": data, "output": output, "cells": 4, "frames": 3}
    usual |= {"features": output.parent / "features", "targets": "[q_proj, v_proj]", "rank": 4, "lr": 1e-2, "batch_size": 8}
    usual |= {"max_length": 48, "dtype": "float32", "tensorboard": "false", "log_steps": 1, "schedule": "constant"}
    return ["train", *(f"--{name}={value}" for name, value in (usual | settings).items())]
