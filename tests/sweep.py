"""One class of transformers through the whole path: tiny model, attach to all linear layers, one training step, save, load, merge.

`python tests/sweep.py` (with the package installed) runs all classes and writes docs/families.md.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from families import OWN, tiny

import doratune
from doratune import AdapterConfig
from doratune.adapter.running import Running
from doratune.support.examples import candidates, flat_tensors


@dataclass
class Result:
    """What happened to one class; `stage` is where it ended, and `ok` only after the last one."""

    family: str
    name: str
    stage: str = "built"
    layers: int = 0
    moved: int = 0
    named: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.stage == "ok"

    @property
    def exception(self) -> bool:
        """Did it not come to the adapter at all?"""
        return self.stage in ("built", "run")


def classes() -> dict[str, str]:
    """family → the class that is taken: a language model, a classifier or the like where there is one."""
    from transformers.models.auto import modeling_auto as auto

    tasks = (
        "CAUSAL_LM MASKED_LM SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION QUESTION_ANSWERING SEQ_TO_SEQ_CAUSAL_LM "
        "IMAGE_CLASSIFICATION AUDIO_CLASSIFICATION CTC SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT SEMANTIC_SEGMENTATION OBJECT_DETECTION"
    )
    found: dict[str, str] = {}
    for task in tasks.split():
        for family, name in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    for family, name in auto.MODEL_MAPPING_NAMES.items():
        found.setdefault(family, name if isinstance(name, str) else name[0])
    first: dict[str, str] = {}
    for family, name in sorted(found.items()):
        if name not in first.values():
            first[family] = name
    return first


def run(family: str, name: str, folder: Path) -> Result:
    """Take one class through it all; an error of any kind ends in `reason`."""
    result = Result(family, name)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            _through(result, folder)
    except Exception as error:  # any of some hundred classes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result.reason = f"{type(error).__name__}: {' '.join(lines)[:160]}"
        if result.stage == "step" and (reason := _own_backward(result)):
            result.stage, result.layers, result.reason = "run", 0, f"without an adapter too: {reason}"
    return result


def _own_backward(result: Result) -> str:
    """The error of the plain model's own backward, if it has one."""
    model = tiny(result.name, OWN.get(result.family))
    example, _ = runnable(model)
    try:
        sum(t.sum() for t in flat_tensors(model(**copy.deepcopy(example))) if t.requires_grad).backward()
    except RuntimeError as error:
        return str(error).splitlines()[0][:120]
    return ""


def _through(result: Result, folder: Path) -> None:
    own = OWN.get(result.family)
    model = tiny(result.name, own)
    result.stage = "run"
    example, base = runnable(model)
    with torch.no_grad():
        if not _same(outputs(model, example), outputs(model, example)):
            raise ValueError("two evaluations of one input differ: its forward draws random numbers")
    result.stage = "attach"
    doratune.attach(model, AdapterConfig(rank=2))
    layers = dict(doratune.adapters(model))
    result.layers, result.left_out = len(layers), len(doratune.verify(model).left_out)
    result.stage = "start"
    if not _near(outputs(model, example), base, 1e-5):
        raise AssertionError("the untrained adapter changes the output")
    result.stage = "step"
    result.moved, result.named = step(model, layers, example)
    if result.moved + len(result.named) != result.layers:
        raise AssertionError("a layer neither moved nor was named")
    away(model)
    result.stage = "save"
    expected = outputs(model, example)
    doratune.save(model, folder / "adapter")
    fresh = tiny(result.name, own)
    doratune.load(fresh, folder / "adapter")
    if not _same(outputs(fresh, example), expected):
        raise AssertionError("loaded into a fresh copy, it computes something else")
    result.stage = "merge"
    bypassed = [name for name, why in result.named.items() if "read" in why or "around" in why]
    doratune.merge(model)
    if not bypassed and not _near(outputs(model, example), expected, 1e-3):
        raise AssertionError(f"merged outputs are {_distance(outputs(model, example), expected):.2g} off")
    doratune.unmerge(model)
    if not _same(outputs(model, example), expected):
        raise AssertionError("after unmerge it computes something else")
    doratune.detach(model)
    if not _same(outputs(model, example), base):
        raise AssertionError("after detach it computes something else")
    result.stage = "ok"


def runnable(model):
    """(an input that the model takes, its outputs)."""
    error = ValueError("no input can be made from its config")
    for example in candidates(model):
        try:
            out = outputs(model, example)
        except Exception as problem:
            error = problem
            continue
        if out:
            return example, out
    raise error


@torch.no_grad()
def outputs(model, example) -> list[torch.Tensor]:
    torch.manual_seed(0)
    out = model.eval()(**copy.deepcopy(example))
    return [t.clone() for t in flat_tensors(out) if t.is_floating_point() and t.numel()]


def step(model, layers, example) -> tuple[int, dict[str, str]]:
    """One step of AdamW on the sum of the outputs' squares: (layers that moved, the others with why)."""
    optimizer = torch.optim.AdamW(doratune.parameter_groups(model, lr=1e-2))
    before = {name: [p.detach().clone() for p in own(layer)] for name, layer in layers.items()}
    with Running(model) as seen:
        out = [t for t in flat_tensors(model.eval()(**copy.deepcopy(example))) if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = sum((torch.randn(t.shape, generator=generator).to(t) * torch.nan_to_num(t, 0, 0, 0)).sum() for t in out)
    loss.backward()
    has_gradient = {name: any(p.grad is not None and bool(p.grad.any()) for p in own(layer)) for name, layer in layers.items()}
    optimizer.step()
    optimizer.zero_grad()
    moved = [n for n, layer in layers.items() if any(not torch.equal(a, b) for a, b in zip(before[n], own(layer), strict=True))]
    problems = seen.problems()
    named = {}
    for name in layers:
        if name in moved:
            continue
        idle = "no gradient reaches it" if seen.called(name) and not has_gradient[name] else "it does not run"
        named[name] = problems.get(name, idle)
    return len(moved), named


def own(layer) -> list[torch.Tensor]:
    return [p for p in (layer.lora_A, layer.lora_B, layer.magnitude) if p is not None]


@torch.no_grad()
def away(model) -> None:
    """Further from the start, so that what is lost shows."""
    for i, (_, layer) in enumerate(doratune.adapters(model)):
        layer.lora_B.add_(0.05 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i)))
        layer.magnitude.mul_(1.05)


def _same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True))


def _distance(a, b) -> float:
    a, b = (torch.cat([torch.nan_to_num(t, 0, 0, 0).double().flatten() for t in ts]) for ts in (a, b))
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def _near(a, b, tolerance: float) -> bool:
    return len(a) == len(b) and _distance(a, b) <= tolerance


def _plain(text: str) -> str:
    """A message in a table's cell: no new cell, no link."""
    return text.replace("|", "/").replace("[", "\\[")


def page(results: list[Result]) -> str:
    """docs/families.md."""
    done, out = [r for r in results if not r.exception], [r for r in results if r.exception]
    failed = [r for r in done if not r.ok]
    idle = {r.name: r.named for r in done if r.named}
    lines = [
        "# Families of transformers",
        "",
        "Written by `python tests/sweep.py`. Every family that transformers registers, one class each: a tiny model from its",
        "own config, `attach` to all linear layers, one training step, `save`, `load` into a fresh copy of the base, `merge`,",
        "`unmerge`, `detach`; outputs are compared after each.",
        "",
        f"{len(results)} classes: {len(done)} went through with {sum(r.layers for r in done):,} adapted layers, of which "
        f"{sum(r.moved for r in done):,} moved in the step and {sum(len(r.named) for r in done):,} were named with the reason; "
        f"{len(failed)} of them failed; {len(out)} could not be built or run so (below).",
        "",
        "## Layers that did not move",
        "",
        "| class | layers | reason |",
        "|---|---|---|",
    ]
    for name, named in sorted(idle.items()):
        for reason in dict.fromkeys(named.values()):
            which = [n for n, why in named.items() if why == reason]
            shown = ", ".join(f"`{n}`" for n in which[:3]) + (f" and {len(which) - 3} more" if len(which) > 3 else "")
            lines.append(f"| {name} | {shown} | {reason} |")
    lines += ["", "## Failed", ""] if failed else []
    lines += [f"- {r.name}: {r.stage}: {r.reason}" for r in failed]
    lines += ["", "## Not built or run by the sweep", "", "| family | class | why |", "|---|---|---|"]
    lines += [f"| {r.family} | {r.name} | {_plain(r.reason)} |" for r in out]
    lines += ["", "## Went through", "", "| family | class | layers adapted | moved | left out |", "|---|---|---|---|---|"]
    lines += [f"| {r.family} | {r.name} | {r.layers} | {r.moved} | {r.left_out} |" for r in done if r.ok]
    return "\n".join(lines) + "\n"


def sweep(names: dict[str, str], say=None) -> list[Result]:
    results = []
    for family, name in names.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(family, name, Path(folder)))
        if say:
            say(results[-1])
    return results


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    results = sweep(classes(), lambda r: print(f"{r.name}: {r.stage} {r.layers} {r.reason}", flush=True))
    path = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    path.write_text(page(results), encoding="utf-8")
    sys.exit(any(not r.ok and not r.exception for r in results))


if __name__ == "__main__":
    main()
