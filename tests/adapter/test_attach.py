"""Attaching (`adapter/attach.py`): what it costs a layer, counted."""

from __future__ import annotations

import sys

from torch import nn

import doratune
from doratune import AdapterConfig


def test_attaching_takes_as_much_a_layer_in_a_larger_model():
    def calls(layers: int) -> int:
        model, count = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), [0]

        def see(frame, event, _):
            count[0] += event == "call"

        sys.setprofile(see)
        try:
            doratune.attach(model, AdapterConfig(rank=2, targets="all-linear"))
        finally:
            sys.setprofile(None)
        return count[0]

    calls(1)  # what is imported and asked once
    few, many = calls(20), calls(80)
    assert many < 4.2 * few
