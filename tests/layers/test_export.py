"""torch.export: a program says what its own tensors say, or raises one clear line; never what some other model's tensors say.

The programs are saved in one process, loaded and run in another: alone first, then next to adapted models of the same shapes and
other values, whose layers come in the same order.
"""

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from twins import TOLERANCE, WIDTH, chain, config, error, fresh, moved, values

import doratune

CASES = ("dora", "dora, input", "dora, pissa", "magnitude only", "dvora", "dlokr", "lora")
SOME = ("dora", "dora, input", "dvora", "lora")


def kinds():
    """Models of other layer kinds, with an input of each."""
    torch.manual_seed(0)
    picture, ids = torch.randn(2, 4, 5, 5), torch.tensor([[1, 5, 0]])
    return {
        "convolution": (nn.Sequential(nn.Conv2d(4, 6, 3)), picture),
        "convolution, input": (nn.Sequential(nn.Conv2d(4, 6, 1)), picture),
        "embedding": (nn.Sequential(nn.Embedding(9, 6)), ids),
        "bf16": (nn.Sequential(nn.Linear(WIDTH, 24)).bfloat16(), torch.randn(4, WIDTH).bfloat16()),
    }


def example(name):
    """(an adapted model, an input)."""
    if name in kinds():
        model, x = kinds()[name]
        axis = "input" if "input" in name else "output"
        adapter = doratune.AdapterConfig(rank=3, targets=["0"], magnitude_axis=axis)
        return moved(doratune.attach(model, adapter)), x
    return chain(name), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(4))


def other(name):
    """A model of these shapes with other values everywhere."""
    model = moved(example(name)[0], seed=11)
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.weight.mul_(1 + torch.rand_like(layer.weight))
    return model


NAMES = (*CASES, *kinds())


def tried(run):
    """What it says, or the error's message."""
    try:
        return run()
    except Exception as problem:  # any: it is looked at by the test
        return f"{type(problem).__name__}: {problem}"


@torch.no_grad()
def write_programs(folder):
    """Export all, in a process that did nothing before: layers get the numbers that they get elsewhere, too."""
    refused = {}
    for i, name in enumerate(NAMES):
        model, x = example(name)
        said = tried(lambda i=i, model=model, x=x: torch.export.save(torch.export.export(model, (x,)), f"{folder}/{i}.pt2"))
        torch.save((x, model(x)), f"{folder}/{i}.pt")
        refused |= {name: said} if isinstance(said, str) else {}
    Path(folder, "refused.json").write_text(json.dumps(refused))


@torch.no_grad()
def run_programs(folder):
    """name -> what its program says: alone, and next to other models."""

    def said(name):
        x, y = torch.load(f"{folder}/{NAMES.index(name)}.pt")
        return tried(lambda: error(torch.export.load(f"{folder}/{NAMES.index(name)}.pt2").module()(x), y))

    assert doratune.attach  # loaded, as by any use of the package
    refused = json.loads(Path(folder, "refused.json").read_text())
    names = [name for name in NAMES if name not in refused]
    alone, others = {name: said(name) for name in names}, [other(name) for name in NAMES]
    found = {name: {"alone": alone[name], "next to others": said(name)} for name in names}
    assert len(others) == len(NAMES)
    Path(folder, "found.json").write_text(json.dumps(found | {name: {"export": text} for name, text in refused.items()}))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """name -> {"alone" and "next to others": relative error in another process, or the message of its error}."""
    folder, here = tmp_path_factory.mktemp("programs"), Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), str(Path(doratune.__file__).parents[1])])
    for function in ("write_programs", "run_programs"):
        command = [sys.executable, "-c", f"import test_export; test_export.{function}({str(folder)!r})"]
        child = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_in_another_process(elsewhere, name):
    close = TOLERANCE[torch.bfloat16 if name == "bf16" else torch.float32]
    for where, said in elsewhere[name].items():
        if isinstance(said, str):
            kind, _, message = said.partition(": ")
            assert kind in ("RuntimeError", "UserError") and 20 < len(message) < 400 and "\n" not in message, (where, said)
        else:
            assert said < close, where


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("case", SOME)
def test_in_this_process(case, gradients):
    """Next to its own model, another one, and after the model's training went on (a program shares the model's tensors)."""
    model, x = example(case)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (x,)).module()
        own = model(x).detach()
        assert error(program(x), own) < 1e-5
        stranger = other(case)
        stranger(x)
        assert error(program(x), own) < 1e-5
        moved(model, seed=5)
        want = fresh(case, values(program))(x)
        assert error(want, own) < 1e-5 or error(want, model(x)) < 1e-5
        assert error(program(x), want) < 1e-5


@pytest.mark.parametrize("case", SOME)
def test_other_values_in_a_program(case):
    """A program that was saved and loaded shares nothing with the model."""
    model, x = example(case)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), file := io.BytesIO())
        program, own = torch.export.load(file).module(), model(x)
        assert error(program(x), own) < 1e-5
        program.load_state_dict(values(other(case)))
        want = fresh(case, values(program))(x)
        assert error(want, own) > 0.05
        assert error(program(x), want) < 1e-5
        assert torch.equal(model(x), own)


@pytest.mark.parametrize("case", ["dora", "dora, input", "lora"])
def test_a_program_whose_model_is_gone(case):
    model, x = example(case)
    with torch.no_grad():
        own, program = model(x), torch.export.export(model, (x,)).module()
        del model
        gc.collect()
        stranger = doratune.attach(nn.Sequential(nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)), config(case))
        stranger(x)
        said = tried(lambda: error(program(x), own))
    assert said < 1e-5 if not isinstance(said, str) else said.startswith(("RuntimeError: ", "UserError: ")) and "\n" not in said
