"""Looking inside the weights (§3.2, §4.2): how far magnitude and direction moved, and what a gradient changes."""

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
