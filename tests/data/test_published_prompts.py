"""The published prompts, character by character, and training on them."""

import json

import pytest
import torch
import yaml

from doratune.data import encoder, instruction
from doratune.data.encode import IGNORED, encode_all
from doratune.data.published_prompts import encode, evaluation_prompt, training_prompt
from doratune.errors import UserError
from doratune.support.models import load_tokenizer
from doratune.training.examples import datasets
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

ITEM = {
    "instruction": "Is it so?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
WITH_INPUT = ITEM | {"instruction": "Is it so?", "input": "It is so."}


def test_training_prompt_to_the_space():
    """Two spaces after "request."; 16 spaces in front of every line of the template; a line of 16 spaces between the sections."""
    assert repr(training_prompt(ITEM)) == (
        "'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \\n\\n"
        "                ### Instruction:\\n                Is it so?\\n\\nAnswer format: true/false\\n                \\n"
        "                ### Response:\\n                '"
    )
    assert repr(training_prompt(WITH_INPUT)) == (
        "'Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \\n\\n"
        "                ### Instruction:\\n                Is it so?\\n                \\n"
        "                ### Input:\\n                It is so.\\n                \\n"
        "                ### Response:\\n                '"
    )


def test_evaluation_prompt_to_the_space():
    """One space after "request."; an empty line between the sections."""
    assert repr(evaluation_prompt(ITEM)) == (
        "'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request. \\n\\n"
        "                ### Instruction:\\n                Is it so?\\n\\nAnswer format: true/false\\n\\n"
        "                ### Response:\\n                '"
    )
    assert repr(evaluation_prompt(WITH_INPUT)) == (
        "'Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\\n\\n"
        "                ### Instruction:\\n                Is it so?\\n\\n"
        "                ### Input:\\n                It is so.\\n\\n"
        "                ### Response:\\n                '"
    )


def test_prompt_and_answer_are_one_text(smollm2):
    """SmolLM2's tokenizer gives the last of the 16 spaces to the answer's first token, in training only."""
    tokenizer = load_tokenizer(smollm2)
    example = encode(ITEM, tokenizer)
    text = training_prompt(ITEM) + ITEM["output"]
    assert example.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    answer = [tokenizer.decode([i]) for i, a in zip(example.ids, example.answer) if a]
    assert answer == [" the", " correct", " answer", " is", " true", tokenizer.eos_token]
    assert tokenizer.decode(example.ids[example.last_answer - 1]) == "\n" + " " * 15
    assert tokenizer.decode(tokenizer(evaluation_prompt(ITEM))["input_ids"][-1]) == "\n" + " " * 16


def test_loss_on_the_prompt_only_where_asked(tiny_tokenizer):
    prompt, answer = training_prompt(ITEM), ITEM["output"] + tiny_tokenizer.eos_token
    (row,), _ = encode_all([ITEM], encode, tiny_tokenizer, 512)
    assert tiny_tokenizer.decode(row["input_ids"]) == prompt + answer
    assert tiny_tokenizer.decode([i for i in row["labels"] if i != IGNORED]).strip() == answer
    (whole,), _ = encode_all([ITEM], encode, tiny_tokenizer, 512, on_prompt=True)
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]


def test_a_tokenizer_that_closes_every_text(tiny_tokenizer):
    """One end-of-sequence token at the end, none counted into the prompt."""
    closing = lambda text: {"input_ids": [*tiny_tokenizer(text)["input_ids"], 2]}  # noqa: E731
    closing.__dict__["eos_token_id"] = 2
    assert encode(ITEM, closing) == encode(ITEM, tiny_tokenizer)


def test_chat_data_has_no_published_prompt(tiny_tokenizer):
    assert encoder("instruction")(ITEM, tiny_tokenizer) == instruction.encode(ITEM, tiny_tokenizer)
    assert encoder("instruction", "published")(ITEM, tiny_tokenizer) == encode(ITEM, tiny_tokenizer)
    with pytest.raises(UserError, match="prompt is published, which is for instruction data"):
        encoder("chat", "published")
    with pytest.raises(UserError, match="prompt is 'alpaca'; expected one of plain, published"):
        TrainRecipe(data="x", prompt="alpaca").check()


def test_a_recipe_chooses_the_prompt(tiny_folder, tiny_tokenizer, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([ITEM, ITEM | {"instruction": "Or not?"}] * 4))
    common = {"model": str(tiny_folder), "data": str(data), "eval_size": 2, "rank": 2, "tensorboard": False, "dtype": "float32"}
    for prompt, text in (("plain", instruction.prompt_of), ("published", training_prompt)):
        recipe = TrainRecipe(**common, prompt=prompt, max_steps=1, batch_size=2, output=str(tmp_path / prompt))
        rows, eval_rows = datasets(recipe, tiny_tokenizer, lambda line: None)
        expected = {text(item) + ITEM["output"] + "</s>" for item in json.loads(data.read_text())}
        assert {tiny_tokenizer.decode(row["input_ids"]) for row in rows + eval_rows} == expected
        assert torch.tensor(train(recipe, say=lambda line: None)["final_loss"]).isfinite()
        assert yaml.safe_load((tmp_path / prompt / "recipe.yaml").read_text())["prompt"] == prompt
