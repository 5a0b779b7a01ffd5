"""An adapter over a model in memory: what is selected, attached, checked, trained and merged.

attach.py     attach to a model in place, walk over it, take it off again
layer.py      one layer: adapted, and a plain one again
targets.py    which modules a configuration selects, and why others are left out
start.py      what A, B and m start from
base_norms.py   by which an adapter knows its base again
fresh.py      parameters that no file holds: drawn at random, or a vocabulary that grew
whole.py      modules trained whole, in fp32
states.py     merged, and merged for good
several.py    several adapters on one model, by name
combine.py    new adapters out of others: sums, and the line from the base
routes.py     calls that go another way: the base in a block, an adapter for each example
kernels.py     kernels that write over a layer's output
foreign.py    other packages' adapters, refused
elsewhere.py   what cannot be done where weights are in shards or offloaded
statistics.py   a frozen base's running statistics stay as they are
guards.py     what save_pretrained and the like do on an attached model
groups.py     parameter groups for an optimizer: decay, rates, LoRA+
verify.py     is every target really DoRA?
running.py    which layers are called, and which weights are read past them
inspect.py    the table of what is adapted
merge.py      merge into the weights, and back bit for bit
merged_state.py   the merged state dict beside the live model
stored.py     a quantized layer kept aside while a dense one stands in its place
"""
