"""Means with intervals over seeds, and paired differences between two methods.

Interval of a mean of S seeds: Student's t, mean ± t(S − 1)·sd/√S; none for one seed. It covers what training varies, not the choice
of test items.

Paired bootstrap of a difference in accuracy: the two methods answered the same items after training with the same seeds, so
d[seed, item] = correct_a − correct_b. Items are resampled with replacement within their task; the figure is the mean over tasks,
as the score. Seeds are not resampled: three of them, drawn again, never leave their own range, and 18 to 24 % of true nulls were
called differences (simulated, 3 seeds, 1000 items). Each resample is moved by t(S − 1)·sd/√S of the seeds' differences instead,
which leaves 6 % at most. An interval that touches 0 means "not shown", never "equal". Cost: resamples × items additions.

Smallest visible difference of M comparisons: (t(1 − α/2M) + t(power))·error with S − 1 degrees of freedom, the true difference that
such a grid finds with probability `power` (80 %), its error being what was measured. M comparisons are corrected by Holm's method
(Scand. J. Stat. 6, 1979), which keeps the chance of one false difference among them all at α.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `low` and `high` are None where one seed leaves nothing to estimate from."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """a − b, its interval, p (two-sided; of a bootstrap the share of resamples beyond 0, doubled) and its standard error."""

    mean: float
    low: float
    high: float
    p: float
    error: float
    seeds: int

    @property
    def shown(self) -> bool:
        """Does the interval leave out 0?"""
        return self.low > 0 or self.high < 0

    def visible(self, comparisons: int = 1, confidence: float = 0.95, power: float = 0.8) -> float:
        """The smallest true difference that is found with probability `power` among so many comparisons."""
        from scipy import stats

        law = stats.t(self.seeds - 1) if self.seeds > 1 else stats.norm()
        return float((law.ppf(1 - (1 - confidence) / (2 * comparisons)) + law.ppf(power)) * self.error)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number: below α where the comparison stands at a family-wise error of α."""
    corrected, least = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = least
    return corrected


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student's t interval of one figure a seed."""
    from scipy import stats

    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return Estimate(mean, None, None, len(data))
    half = float(stats.t.ppf((1 + confidence) / 2, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    return Estimate(mean, mean - half, mean + half, len(data))


def paired_bootstrap(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """The difference of two methods' accuracy, a − b, as a mean over tasks.

    Args:
        a, b: {task: (S, N) array, 1 where the answer was right}, rows of the same seeds, columns of the same items.

    Raises:
        ValueError: tasks or shapes that differ.
    """
    if a.keys() != b.keys() or any(a[task].shape != b[task].shape for task in a) or not a:
        raise ValueError("the two methods answered different items, or ran with different numbers of seeds")
    differences = [np.asarray(a[task], dtype=np.float64) - b[task] for task in a]
    random, seeds = np.random.default_rng(seed), len(differences[0])
    over_items = [d.mean(0) for d in differences]
    drawn = np.empty(resamples)
    for i in range(resamples):
        means = [d[random.integers(len(d), size=len(d))].mean() for d in over_items]
        drawn[i] = sum(means) / len(means)
    of_items, of_seeds = float(drawn.std()), 0.0
    if seeds > 1:
        of_seeds = float(np.mean([d.mean(1) for d in differences], axis=0).std(ddof=1) / np.sqrt(seeds))
        drawn += random.standard_t(seeds - 1, resamples) * of_seeds
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    mean = sum(d.mean() for d in differences) / len(differences)
    p = float(min(1.0, 2 * max(tail, 1 / resamples)))
    return Difference(float(mean), float(low), float(high), p, float(np.hypot(of_items, of_seeds)), seeds)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """The mean of a − b over seeds that both ran, with Student's t: for figures without items (a loss). Needs two seeds."""
    from scipy import stats

    data = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    estimate = over_seeds(data, confidence)
    if estimate.half is None:
        raise ValueError("one seed has no interval")
    spread = data.std(ddof=1) / np.sqrt(len(data))
    p = 2 * stats.t.sf(abs(estimate.mean) / spread, len(data) - 1) if spread else float(estimate.mean == 0)
    return Difference(estimate.mean, estimate.low, estimate.high, float(p), float(spread), len(data))
