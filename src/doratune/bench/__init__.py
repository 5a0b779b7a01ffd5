"""Time and memory of DoRA against LoRA, against PEFT's two, and against the frozen base: `doratune bench`.

    settings.py      BenchSettings: what is measured, on what
    measure.py       all measurements; which threads each is made with
    record.py        facts of a run, JSON files and their names
    allocator.py     nothing that is freed goes back to the system, for any arm
    arms.py          the arms, all over the same weights
    shapes.py        the measured model: real, or a shape with random weights
    clock.py         arms in turn, threads, ratios round by round
    train_step.py    a training step, with and without accumulation and checkpointing
    decode.py        unmerged and merged greedy decode
    mixed.py         decode of a batch of eight adapters
    memory.py        bytes kept for the backward pass
    allocations.py   bytes of all tensors at a step's peak, on a CPU
    norm.py          the norm of one large layer
    layer.py         one layer's training step
    sizes.py         cost against size and rank
    host.py          what a small layer costs the host, in time and in operations
    operations.py    counts operations and host reads
    startup.py       importing the package, attaching to many layers
    targets.py       what is promised, and the table of it
    pages.py         docs/performance.md
    sections.py      the tables of docs/performance.md
    host_tables.py   those of host cost
    tables.py        figures in words; which clock counts where

A measurement is a file with a function `measure`; from Python, `measure.run_all(BenchSettings(…))` does what the command does.
"""
