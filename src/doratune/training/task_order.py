"""The order of a run of several tasks: batches of one task each, as often as the task has items, in an order drawn anew each epoch.

    epoch e:  each task's items shuffled, cut into batches; the rests of all tasks together; the batches shuffled, a short one last

So a task's share of the steps is its share of the data, and little of a batch is padding. Seed and epoch alone decide: a resumed
run sees the batches it would have seen. Cost: a permutation an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TaskOrder(Sampler[int]):
    """Indices of rows, `batch_size` in a row of one task.

    Args:
        tasks: of each row.
    """

    def __init__(self, tasks: Sequence[str], batch_size: int, seed: int):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.rows: dict[str, list[int]] = {}
        for row, task in enumerate(tasks):
            self.rows.setdefault(task, []).append(row)
        self.count = len(tasks)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole, rest = [], []
        for rows in self.rows.values():
            mixed = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
            end = len(mixed) - len(mixed) % self.batch_size
            whole += [mixed[i : i + self.batch_size] for i in range(0, end, self.batch_size)]
            rest += mixed[end:]
        rest = [rest[i] for i in torch.randperm(len(rest), generator=generator)]
        end = len(rest) - len(rest) % self.batch_size
        whole += [rest[i : i + self.batch_size] for i in range(0, end, self.batch_size)]
        for i in torch.randperm(len(whole), generator=generator):
            yield from whole[i]
        yield from rest[end:]
