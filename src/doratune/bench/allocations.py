"""The largest number of bytes that PyTorch's own CPU allocator has handed out at once, counted by PyTorch's profiler.

Unlike resident memory it holds no libraries, no heap's holes and no page that was never written; it is the same in every run.
Cost: one event an allocation, a second or two for some steps.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

MARK = "counted from here"


def peak_of_tensors(prepare: Callable[[], Callable[[], None]], times: int = 2) -> int:
    """Bytes at the peak of so many calls of what `prepare` returns, after one more that is not looked at; tensors of `prepare` that
    stay alive are counted."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step = prepare()
        step()
        gc.collect()  # what building a model left in circles
        with record_function(MARK):
            for _ in range(times):
                step()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text(encoding="utf-8"))["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == MARK)
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]" and event["ts"] >= begin)
