"""The demonstration's adapter as GGUF of each type: logits read back by transformers, greedy text in llama.cpp, beside ours.

python benchmarks/engines.py runs/demo/adapter          # 40 test items, f32, f16, q8_0; needs the extra `engines`
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULT = Path(__file__).parent / "results" / "engines_cpu.json"
TYPES, NEW_TOKENS = ("f32", "f16", "q8_0"), 8


def main() -> None:
    import llama_cpp
    import torch
    from transformers import AutoModelForCausalLM

    import doratune
    from doratune.data import facts
    from doratune.data.instruction import prompt_of
    from doratune.export.gguf import export_gguf
    from doratune.support.environment import environment
    from doratune.support.files import write_json
    from doratune.support.models import load_model, load_tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("adapter")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--items", type=int, default=40)
    words = parser.parse_args()
    tokenizer, model = load_tokenizer(words.model), doratune.load(load_model(words.model), words.adapter).eval()
    prompts = [prompt_of(item) for item in facts.items("test")[: words.items]]
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    with torch.no_grad():
        logits = [model(input_ids=one).logits for one in ids]
        greedy = [model.generate(one, max_new_tokens=NEW_TOKENS, do_sample=False)[0, one.shape[1] :] for one in ids]
    ours = [tokenizer.decode(one, skip_special_tokens=True) for one in greedy]
    asked = [
        ("/completion", {"prompt": one[0].tolist(), "n_predict": NEW_TOKENS, "temperature": 0, "cache_prompt": False})
        for one in ids
    ]
    rows = {}
    for kind in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(export_gguf(words.model, Path(words.adapter), Path(folder) / kind, kind).file)
            back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
            with torch.no_grad():
                errors = [((back(input_ids=one).logits - y).norm() / y.norm()).item() for one, y in zip(ids, logits, strict=True)]
            answers = [answer["content"] for answer in llama_cpp.ask(file, *asked)]
        equal = sum(answer == text for answer, text in zip(answers, ours, strict=True))
        rows[kind] = {"largest_relative_error": max(errors), "same_greedy_text": equal, "items": len(prompts)}
        print(kind, rows[kind], flush=True)
        write_json(RESULT, {"command": "python benchmarks/engines.py", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
