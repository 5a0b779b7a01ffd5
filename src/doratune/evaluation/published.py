"""Published accuracies on the eight tasks, by base model, method and rank: the authors' table, protocol `paper`.

Source: README of the authors' commonsense experiments (NVlabs/DoRA, commonsense_reasoning); averages agree with the paper's
Table 1 and Fig. 5. Every figure there is a single run.
"""

from __future__ import annotations

from typing import NamedTuple

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
AUTHORS = "the authors' table"

_TABLE = {
    ("LLaMA-7B", "lora", 4): (2.3, 46.1, 18.3, 19.7, 55.2, 65.4, 51.9, 57.0),
    ("LLaMA-7B", "lora", 8): (31.3, 57.0, 44.0, 11.8, 43.3, 45.7, 39.2, 53.8),
    ("LLaMA-7B", "lora", 16): (69.9, 77.8, 75.1, 72.1, 55.8, 77.1, 62.2, 78.0),
    ("LLaMA-7B", "lora", 32): (67.5, 80.8, 78.2, 83.4, 80.4, 78.0, 62.6, 79.1),
    ("LLaMA-7B", "lora", 64): (66.7, 79.1, 75.7, 17.6, 78.8, 73.3, 59.6, 75.2),
    ("LLaMA-7B", "dora", 4): (51.3, 42.2, 77.8, 25.4, 78.8, 78.7, 62.5, 78.6),
    ("LLaMA-7B", "dora", 8): (69.9, 81.8, 79.7, 85.2, 80.1, 81.5, 65.7, 79.8),
    ("LLaMA-7B", "dora", 16): (70.0, 82.6, 79.7, 83.2, 80.6, 80.6, 65.4, 77.6),
    ("LLaMA-7B", "dora", 32): (69.7, 83.4, 78.6, 87.2, 81.0, 81.9, 66.2, 79.2),
    ("LLaMA-7B", "dora", 64): (70.1, 82.0, 75.6, 85.9, 79.7, 79.1, 63.7, 78.4),
    ("LLaMA2-7B", "lora", 32): (69.8, 79.9, 79.5, 83.6, 82.6, 79.8, 64.7, 81.0),
    ("LLaMA2-7B", "dora", 16): (72.0, 83.1, 79.9, 89.1, 83.0, 84.5, 71.0, 81.2),
    ("LLaMA2-7B", "dora", 32): (71.8, 83.7, 76.0, 89.1, 82.6, 83.7, 68.2, 82.4),
    ("LLaMA3-8B", "lora", 32): (70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0),
    ("LLaMA3-8B", "dora", 16): (74.5, 88.8, 80.3, 95.5, 84.7, 90.1, 79.1, 87.2),
    ("LLaMA3-8B", "dora", 32): (74.6, 89.3, 79.9, 95.5, 85.6, 90.5, 80.4, 85.8),
}
_ELSEWHERE = {
    ("LLaMA-7B", "dora", 8, "boolq"): (76.9, "a public reproduction, 2,515 of 3,270, lr 1e-4, length 512, one 24 GB GPU"),
    ("LLaMA2-7B", None, None, "orca_math"): (7, "the paper's Fig. 6, zero-shot"),
    ("LLaMA2-7B", "lora", 64, "orca_math"): (12, "the paper's Fig. 6, QLoRA"),
    ("LLaMA2-7B", "dora", 64, "orca_math"): (31, "the paper's Fig. 6, QDoRA"),
    ("LLaMA3-8B", None, None, "orca_math"): (23, "the paper's Fig. 6, zero-shot"),
    ("LLaMA3-8B", "lora", 64, "orca_math"): (32, "the paper's Fig. 6, QLoRA"),
    ("LLaMA3-8B", "dora", 64, "orca_math"): (56, "the paper's Fig. 6, QDoRA"),
}


class Figure(NamedTuple):
    accuracy: float
    source: str


def published(model: str, method: str | None, rank: int | None, task: str) -> list[Figure]:
    """Published accuracies (0 to 1) for this base model, method, rank and task, the authors' first; empty where none."""
    base = next((b for b in ("LLaMA2-7B", "LLaMA3-8B", "LLaMA-7B") if _plain(b) in _plain(model)), None)
    figures = []
    if (base, method, rank) in _TABLE and task in TASKS:
        figures.append(Figure(_TABLE[base, method, rank][TASKS.index(task)] / 100, AUTHORS))
    if (base, method, rank, task) in _ELSEWHERE:
        accuracy, source = _ELSEWHERE[base, method, rank, task]
        figures.append(Figure(accuracy / 100, source))
    return figures


def _plain(name: str) -> str:
    """`meta-llama/Llama-2-7b-hf` and `LLaMA2-7B` become alike."""
    return name.split("/")[-1].lower().replace("-", "").replace("_", "").replace("meta", "")
