"""Every public name, as a user with a strict type checker writes it; `make lint` checks this file, nothing runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import doratune
from doratune import AdapterConfig, UserError


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def adapt(model: Mine, folder: Path) -> Mine:
    config = AdapterConfig(rank=4, alpha=8.0, targets=["layer"], dropout=0.1, rank_overrides={"layer": 2})
    assert_type(config.rank, int)
    assert_type(doratune.attach(model, config, trainable=True, name="a"), Mine)
    assert_type(doratune.attach(model, original=model), Mine)
    groups = doratune.parameter_groups(model, lr=1e-4, output_factor_lr_ratio=16)
    assert_type(groups, list[dict[str, Any]])
    print(torch.optim.AdamW(groups))
    report = doratune.verify(model, torch.zeros(1, 4))
    print(report.notes, report.problems, report)
    assert_type(doratune.adapters(model), Iterator[tuple[str, nn.Module]])
    print(doratune.inspect(model).trainable + 1)
    doratune.refresh(model)
    doratune.save(model, folder, format="peft")
    return doratune.detach(doratune.load(model, str(folder), name="b", check_base=False))


def several(model: Mine) -> list[str]:
    assert_type(doratune.use(model, "a"), Mine)
    assert_type(doratune.combine(model, {"a": 0.5, "b": 0.5}, "both"), Mine)
    assert_type(doratune.strength(model, "a", 0.5, "half"), Mine)
    doratune.delete(model, "half")
    with doratune.disabled(model):
        model(torch.zeros(1, 4))
    with doratune.mixed(model, ["a", None]) as way:
        way.choose([None, "b"])
    return doratune.names(model)


def merged(model: Mine) -> dict[str, Tensor]:
    count = doratune.merge(model, keep="cpu", quantized="dense")
    assert_type(count, int)
    doratune.unmerge(model)
    return doratune.merged_state_dict(model)


def as_others_know_it(model: nn.Module) -> str:
    view = doratune.as_peft(model)
    try:
        view.merge_and_unload()
    except UserError as error:
        return str(error)
    print(doratune.peft.accelerate(model))
    return doratune.__version__
