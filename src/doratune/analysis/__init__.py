"""Looking inside the weights (§3.2, §4.2): how far magnitude and direction moved, and what a gradient changes.

change.py      ΔM and ΔD of a weight, from factors or from two dense weights
spectrum.py    singular values and effective rank of an update
gradients.py   the share of a gradient that changes magnitudes
points.py      what is measured of one weight; regression
runs.py        a run's checkpoints, and its short name
measure.py     all of it for one run
figures.py     Fig. 2, Fig. 3, spectra
summary.py     several runs: points.json, figures, a line each
"""

from .change import Change, adapter_changes, model_changes, weight_change
from .gradients import gradient_shares, magnitude_share
from .spectrum import difference_spectrum, effective_rank, update_spectrum

__all__ = [
    "Change",
    "adapter_changes",
    "difference_spectrum",
    "effective_rank",
    "gradient_shares",
    "magnitude_share",
    "model_changes",
    "update_spectrum",
    "weight_change",
]
