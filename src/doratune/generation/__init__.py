"""Text out of a model with adapters: many prompts in batches, or a conversation in the terminal.

adapters.py        one base model and named adapters, all loaded, one of them in use
prompts.py         prompts from a file, and what the model reads of them
sampling.py        settings of generation, prompts in batches
conversation.py    a conversation: history, streaming, commands
"""
