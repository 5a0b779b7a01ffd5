"""A plan as lines of text."""

from __future__ import annotations

from ..support.tables import aligned
from .plan import MEANING, MemoryPlan


def lines(plan: MemoryPlan) -> list[str]:
    """A line for each term, then what follows from the sum."""
    s, total = plan.settings, plan.total
    storage = s.quantize if s.quantize != "none" else s.dtype
    rank = "" if s.method in ("full", "series", "parallel", "prefix") else f" rank {s.rank}"
    devices = f"{s.processes} x {s.device}" + (f", fsdp {s.fsdp}" if s.fsdp != "none" else "")
    head = f"{s.model}: {s.method}{rank}, {storage}, {plan.batch}, on {devices}"
    rows = [
        (name, gib(size), f"{100 * size / total:.1f} %", MEANING[name])
        for name, size in sorted(plan.terms.items(), key=lambda term: -term[1])
    ]
    out = [head, *aligned(("term", "GiB", "share", "what it holds"), rows)]
    out += [f"not counted: {term}: {reason}" for term, reason in plan.uncounted.items()]
    peak = f", largest in the {plan.moment}" if plan.moment else ""
    sums = f"{gib(total)} GiB of {gib(plan.capacity)} on each device{peak}; {plan.trained:,} numbers are trained"
    out.append(f"{sums}: {_verdict(plan)}")
    if plan.largest is not None:
        found = plan.largest or "none, not even 1"
        out.append(f"largest {s.largest} that fits, all else as it is: {found}")
    if plan.fits is False:
        out.append(f"cheapest change after which it fits: {plan.change or 'none of those that are tried; see docs/planning.md'}")
    if plan.flops:
        out.append(f"forward and backward of a batch: {plan.flops:.4g} operations on each device")
    if plan.seconds is not None and s.tokens_per_second is None:
        out.append(f"time at {s.tflops:g} x 10^12 operations/s: {plan.seconds / 3600:.2f} hours")
    elif plan.seconds is not None:
        out.append(f"time at {s.tokens_per_second:g} {plan.unit}/s: {plan.seconds / 3600:.2f} hours")
    return out


def _verdict(plan: MemoryPlan) -> str:
    if plan.fits is None:
        return "what is counted fits; the rest is not known"
    return f"fits, {gib(plan.capacity - plan.total)} GiB are free" if plan.fits else "does not fit"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
