"""Time and memory of DoRA against LoRA, against PEFT's two, and against the frozen base: `doratune bench`."""
