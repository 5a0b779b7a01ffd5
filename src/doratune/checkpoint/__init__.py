"""Adapters on disk: PEFT's layout, ours where PEFT's cannot say it, and merging a checkpoint shard by shard.

adapter.py     save and load
peft.py        PEFT's configuration, both ways
own_file.py    doratune.json, held against PEFT's configuration
tensors.py     one layer's tensors in a file
foreign.py     other programs' files, as an adapter folder is read
convert.py     an adapter into another format
names.py       module names in a file, without what wrappers put into them
values.py      are a file's numbers an adapter's?
base_model.py   the base, of the class that an adapter was trained on
base_check.py     is the base the one that an adapter was trained on?
base_weights.py   base weights that a folder holds, and tied ones
fitting.py     does a folder fit a model, and putting its values in
ties.py        parameters that are tied in the base, when they are merged
merge.py       base + adapter → a model folder, shard by shard
pipelines.py   adapters of pipelines: a folder a part, one file for diffusers, merging
quantized.py   the same for an adapter of a quantized base, three ways
logits.py      does the merged model say the same?
"""

from .adapter import load, save

__all__ = ["load", "save"]
