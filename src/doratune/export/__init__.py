"""Adapters for engines that do not know DoRA, and adapters out of fully fine-tuned models.

weights.py        the tensors of a model or of base + adapter, one at a time
families.py       what llama.cpp computes for each model family
tokenizer.py      a tokenizer as GGUF's metadata
ollama.py         an Ollama Modelfile
gguf.py           a GGUF file: merged weights, metadata, tokenizer, chat template
layers.py         the layers of an adapter on their base, one at a time, as matrices
output_scale.py   LoRA + one factor per output row: exact
truncated.py      plain LoRA by truncated SVD, with the residual
fit.py            the DoRA weight that is nearest to a given one
extract.py        an adapter out of a base and a fully fine-tuned model
"""
