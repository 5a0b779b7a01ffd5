"""How much code one needs to read to follow a call: what a plain layer's forward and backward enter, files and lines counted.

One DoRA layer of nn.Linear in a small model, eager: the layer's call; and a model's forward and backward after an optimizer step,
with the look at its parameters and the preparation of their factors.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import doratune

PACKAGE = Path(doratune.__file__).resolve().parent
FILES, LINES = 8, 300
WHOLE_FILES, WHOLE_LINES = 15, 680


@cache
def lengths(file):
    """(name, first line) -> lines of the body of each function in a file; as in code objects, a decorator is the first line."""
    found = {}
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name, first] = node.end_lineno - node.body[0].lineno + 1
    return found


class Trail:
    """The code of the package that runs, seen by Python's own profiler; the backward on the CPU runs in the same thread."""

    def __init__(self):
        self.code = set()

    def __enter__(self):
        self.before = sys.getprofile()
        sys.setprofile(self.see)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)

    def see(self, frame, event, _):
        if event == "call" and str(PACKAGE) in frame.f_code.co_filename:
            self.code.add(frame.f_code)

    @property
    def files(self):
        return {Path(code.co_filename).relative_to(PACKAGE).as_posix() for code in self.code}

    @property
    def functions(self):
        """(file, name) -> lines; comprehensions and lambdas are part of the function that they stand in."""
        found = {}
        for code in self.code:
            body = lengths(code.co_filename).get((code.co_name, code.co_firstlineno))
            if body is not None:
                found[Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name, code.co_firstlineno] = body
        return found

    def __str__(self):
        functions = self.functions
        total = (
            f"{len(self.files)} files, {len(functions)} functions, {len(self.code)} code objects, {sum(functions.values())} lines"
        )
        return "\n".join([total, *(f"{n:4d} {file}: {name}" for (file, name, _), n in sorted(functions.items()))])


def walked(bias, dtype=torch.float32, method="dora", whole=True):
    """The trail of one forward and backward; whole: of the model, after an optimizer step, else of its layers alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24, bias=bias), nn.GELU(), nn.Linear(24, 24, bias=bias), nn.GELU(), nn.Linear(24, 24)).to(
        dtype
    )
    doratune.attach(model, doratune.AdapterConfig(rank=4, targets=["0", "2"], method=method))
    with torch.no_grad():
        for _, layer in doratune.adapters(model):
            layer.lora_B.normal_(0, 0.01)  # nothing out of the ordinary
            if bias:
                layer.bias.mul_(0.1)
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-3))
    x = torch.randn(16, 24).to(dtype)
    for _ in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trail = Trail()
    if whole:
        with trail:
            y = model(x)
    else:
        model(x)
        for _, layer in doratune.adapters(model):
            layer.register_forward_pre_hook(lambda *_: trail.__enter__() and None)
            layer.register_forward_hook(lambda *_: trail.__exit__())
        y = model(x)
    with trail:
        y.backward(torch.ones_like(y))
    assert trail.code
    return trail


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_short_trail(method, bias, dtype):
    trail = walked(bias, dtype, method, whole=False)
    assert len(trail.files) <= FILES, str(trail)
    assert sum(trail.functions.values()) <= LINES, str(trail)
    trail = walked(bias, dtype, method)
    assert len(trail.files) <= WHOLE_FILES, str(trail)
    assert sum(trail.functions.values()) <= WHOLE_LINES, str(trail)


def test_the_count_itself():
    """Every code object of a named function is found in its file, so nothing is missed."""
    trail = walked(True)
    named = [code for code in trail.code if not code.co_name.startswith("<")]
    assert len(trail.functions) == len(named)
    assert all(0 < n < 200 for n in trail.functions.values())
