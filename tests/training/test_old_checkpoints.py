"""Which checkpoints of a run stay: by their steps, whatever clocks say."""

import json
import os

import pytest

from doratune.training.checkpoints import checkpoints, remove_old

HOUR_NS = 3600 * 10**9


def write(output, steps, times):
    for step, time in zip(steps, times, strict=True):
        path = output / f"checkpoint-{step}"
        path.mkdir()
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        os.utime(path, ns=(time, time))


def left(output):
    return [path.name.removeprefix("checkpoint-") for path in checkpoints(output)]


@pytest.mark.parametrize("clock", ["as usual", "back", "to 1970", "far ahead and back"])
def test_the_last_steps_stay_whatever_the_clock_does(clock, tmp_path):
    times = {"as usual": [1, 2, 3, 4], "back": [4, 3, 2, 1], "to 1970": [9, 9, 9, 0], "far ahead and back": [1, 90, 90, 2]}[clock]
    write(tmp_path, (2, 4, 6, 10), [time * HOUR_NS for time in times])
    remove_old(tmp_path / "checkpoint-10", 2, None)
    assert left(tmp_path) == ["6", "10"]


def test_what_was_just_written_stays_beside_later_steps_of_a_run_before(tmp_path):
    """checkpoint-8 was damaged, the run went on from 2: 4 is what can be resumed from."""
    write(tmp_path, (2, 4, 8), [HOUR_NS] * 3)
    remove_old(tmp_path / "checkpoint-4", 1, None)
    assert left(tmp_path) == ["4"]


def test_the_best_stays(tmp_path):
    write(tmp_path, (2, 4, 6, 8), [HOUR_NS] * 4)
    remove_old(tmp_path / "checkpoint-8", 2, str(tmp_path / "checkpoint-2"))
    assert left(tmp_path) == ["2", "8"]
    remove_old(tmp_path / "checkpoint-8", None, None)
    remove_old(tmp_path / "checkpoint-8", 0, None)
    assert left(tmp_path) == ["2", "8"]
