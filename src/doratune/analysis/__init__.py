"""Looking inside the weights (§3.2, §4.2): how far magnitude and direction moved, and what a gradient changes."""

from .change import Change, adapter_changes, model_changes, weight_change

__all__ = ["Change", "adapter_changes", "model_changes", "weight_change"]
