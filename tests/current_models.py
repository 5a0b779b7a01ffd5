"""Current models by the numbers of their published config.json, and the recipes that `doratune init` makes of them.

`PYTHONPATH=src:tests python tests/current_models.py recipes` writes the recipes again. Source: config.json of each on the hub, and
the total that its page states; what shapes no layer is the default of the class.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from doratune.planning.commented import recipe_text
from doratune.planning.start import Chosen, DataFacts, RunWish, Start, start_of

FACTS = DataFacts(examples=10_000, usual=1024, longest=1024)
"""The data that the recipes are made for; `doratune init` makes one for yours."""


class Published(NamedTuple):
    """A model's shapes, its published number of parameters, and the devices that its recipe is for.

    heads: (attention's, of keys and values, numbers of each)."""

    hub: str
    cls: str
    hidden: int
    inner: int
    layers: int
    heads: tuple[int, int, int]
    vocabulary: int
    tied: bool
    total: int
    memory: float
    processes: int = 1

    def config(self):
        """Its config, of transformers' own class."""
        import transformers

        count, shared, each = self.heads
        return getattr(transformers, self.cls)(
            hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers, vocab_size=self.vocabulary,
            num_attention_heads=count, num_key_value_heads=shared, head_dim=each, tie_word_embeddings=self.tied,
            max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def start(self) -> Start:
        return start_of(RunWish(self.hub, self.memory, "cuda", processes=self.processes), FACTS, self.config())


MODELS = {
    "qwen3_0.6b": Published(
        "Qwen/Qwen3-0.6B", "Qwen3Config",
        1024, 3072, 28, (16, 8, 128), 151936, True, 596_049_920, 8,
    ),
    "gemma3_1b": Published(
        "google/gemma-3-1b-it", "Gemma3TextConfig",
        1152, 6912, 26, (4, 1, 256), 262144, True, 999_885_952, 8,
    ),
    "llama3.2_1b": Published(
        "meta-llama/Llama-3.2-1B-Instruct", "LlamaConfig",
        2048, 8192, 16, (32, 8, 64), 128256, True, 1_235_814_400, 8,
    ),
    "smollm3_3b": Published(
        "HuggingFaceTB/SmolLM3-3B", "SmolLM3Config",
        2048, 11008, 36, (16, 4, 128), 128256, True, 3_075_098_624, 12,
    ),
    "ministral_8b": Published(
        "mistralai/Ministral-8B-Instruct-2410", "MistralConfig",
        4096, 12288, 36, (32, 8, 128), 131072, False, 8_019_808_256, 16,
    ),
    "qwen3_14b": Published(
        "Qwen/Qwen3-14B", "Qwen3Config",
        5120, 17408, 40, (40, 8, 128), 151936, False, 14_768_307_200, 24,
    ),
    "qwen3_32b": Published(
        "Qwen/Qwen3-32B", "Qwen3Config",
        5120, 25600, 64, (64, 8, 128), 151936, False, 32_762_123_264, 48,
    ),
    "llama3.3_70b": Published(
        "meta-llama/Llama-3.3-70B-Instruct", "LlamaConfig",
        8192, 28672, 80, (64, 8, 128), 128256, False, 70_553_706_496, 80, 4,
    ),
}  # fmt: skip


def recipe_of(name: str) -> str:
    """The recipe's text."""
    model, start = MODELS[name], MODELS[name].start()
    devices = f"{model.processes} devices of {model.memory:g} GiB" if model.processes > 1 else f"one device of {model.memory:g} GiB"
    head = [
        f"{model.hub} on {devices}, as doratune init chooses for {FACTS.examples:,} examples of up to {FACTS.longest:,} tokens.",
        "Give --data my.jsonl; doratune init --model … --data my.jsonl --memory GIB makes such a recipe for your data.",
    ]
    planned = f"{start.plan.total / 2**30:.2f} GiB"
    settings = {
        "source": "rank, rates and targets: the paper, as each comment says; sizes: doratune plan",
        "expected": f"{planned} planned on each device; {start.plan.trained:,} numbers trained; not run by us at this size",
        "model": model.hub,
        "output": f"runs/{name}",
        "prompt": Chosen("template", "instructions in the model's own chat template"),
    }
    return recipe_text(head, settings | start.choices)


if __name__ == "__main__":
    for name in sys.argv[2:] or MODELS:
        Path(sys.argv[1], f"{name}.yaml").write_text(recipe_of(name), encoding="utf-8")
