"""Settings that only some objectives read are refused under the others, whatever the setting: none is ignored."""

import dataclasses

import pytest

from doratune import UserError
from doratune.support.fields import setting_names
from doratune.training.objectives import kind_named, names
from doratune.training.recipe import TrainRecipe

READS = {name: set(kind_named(name).reads) for name in names()}
OF_SOME = sorted(set.union(*READS.values()))
VALUES = {
    "columns": {"answer": "reply"}, "roles": {"bot": "assistant"}, "data_format": "chat", "prompt": "published", "loss": "last",
    "turn_order": "any", "system_as": "user", "special_tokens": "keep", "projector": "whole", "vision_tower": "adapted",
    "too_long": "skip", "data_weights": [2.0], "tasks": ["boolq"], "tasks_protocol": "generate", "sample_prompts": ["a text"],
    "text_encoders": "adapted",
}  # fmt: skip
"""Of what is neither a number, nor a switch, nor any text: a value that the setting takes and that is not its default."""


def another(name):
    """A value of the setting that is not its default."""
    default = getattr(TrainRecipe(), name)
    if name in VALUES:
        assert VALUES[name] != default
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    kind = {f.name: str(f.type) for f in dataclasses.fields(TrainRecipe)}[name]
    return "words" if "str" in kind else float(8) if "float" in kind else 8


def refusal(objective, name):
    """What the check of such a recipe says; "" where it takes it."""
    with_images = {"instance_prompt": "a photo of sks dog"} if objective == "dreambooth" else {}
    recipe = TrainRecipe(**({"objective": objective, "data": "images"} | with_images | {name: another(name)}))
    try:
        recipe.check()
    except UserError as error:
        return str(error)
    return ""


OF_TEXT_ALONE = {
    "data_format", "roles", "prompt", "images", "loss", "turn_order", "system_as", "special_tokens", "streaming", "mirror",
    "too_long", "train_on_prompt", "packing", "sample_tokens", "vision_tower",
}  # fmt: skip


def test_what_text_alone_reads():
    others = set.union(*(own for name, own in READS.items() if name != "language_modeling"))
    assert READS["language_modeling"] - others == OF_TEXT_ALONE


def test_every_such_setting_is_one_of_a_recipe():
    assert set(OF_SOME) <= set(setting_names(TrainRecipe))
    assert len(OF_SOME) > 40 and not set.intersection(*READS.values())


@pytest.mark.parametrize("objective", READS)
@pytest.mark.parametrize("name", OF_SOME)
def test_what_only_others_read_is_refused(objective, name):
    text = refusal(objective, name)
    if name in READS[objective]:
        assert f"not for {objective}" not in text
    else:
        readers = [kind for kind in names() if name in READS[kind]]
        end = f"which is for objective {' or '.join(readers)}, not for {objective}: drop it"
        end += f", or set objective: {readers[0]}" if len(readers) == 1 else ""
        assert text.startswith(f"{name} is ") and text.endswith(end)


def test_what_is_said_as_it_is_anyway_is_taken():
    TrainRecipe(data="images", objective="image_classification", max_length=512, class_names="", resolution=512).check()
