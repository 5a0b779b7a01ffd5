"""Adapters for engines that do not know DoRA, and adapters out of fully fine-tuned models.

weights.py        the tensors of a model or of base + adapter, one at a time
families.py       what llama.cpp computes for each model family
tokenizer.py      a tokenizer as GGUF's metadata
ollama.py         an Ollama Modelfile
gguf.py           a GGUF file: merged weights, metadata, tokenizer, chat template
"""
