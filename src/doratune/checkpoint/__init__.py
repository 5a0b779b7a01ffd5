"""Adapters on disk: PEFT's layout, ours where PEFT's cannot say it, and merging a checkpoint shard by shard."""

from .adapter import load, save

__all__ = ["load", "save"]
