"""`doratune plan` against the memory that training takes: each run in a process of its own, its peak read from the system.

    python benchmarks/planning.py                      # SmolLM2-135M on CPU, full, LoRA, DoRA, DoRA over nf4, two batch sizes
    python benchmarks/planning.py --images             # a LLaVA of 126 million numbers, ViT-B/16 and ResNet-50; full, LoRA, DoRA

What loading leaves behind is not the step's: the peak counts from the moment when the model is there. One JSON, written after
each case. Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TEXT = [
    {"method": method, "quantize": quantize, "batch_size": batch, "max_length": 128}
    for batch in (4, 8)
    for method, quantize in (("full", "none"), ("lora", "none"), ("dora", "none"), ("dora", "nf4"))
]
IMAGES = [
    {"made": made, "method": method, "batch_size": batch, "dtype": "float32"} | more
    for made, batches, more in (
        ("llava", (2, 4), {"max_length": 256, "targets": "all-linear", "projector": "whole"}),
        ("vit", (8, 16), {"objective": "image_classification", "targets": "all-layers"}),
        ("resnet", (8, 16), {"objective": "image_classification", "targets": "all-layers"}),
    )
    for batch in batches
    for method in ("full", "lora", "dora")
]
"""Models of a few hundred MB, made from configs: LLaVA of a CLIP and a Llama, ViT-B/16, ResNet-50."""


def made_model(kind: str, folder: Path) -> None:
    """A model folder with its processor, of random numbers."""
    import transformers as t

    square = {"size": {"height": 224, "width": 224}}
    if kind == "vit":
        model, processor = t.ViTForImageClassification(t.ViTConfig()), t.ViTImageProcessorPil(**square)
    elif kind == "resnet":
        model, processor = t.ResNetForImageClassification(t.ResNetConfig()), t.ViTImageProcessorPil(**square)
    else:
        model, processor = _llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava():
    """LLaVA with 196 tokens an image over 104 million numbers of language and 22 of images, with a byte-level tokenizer."""
    import transformers as t
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": ["<image>"]}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=inner, **ends)
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
        "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    vision = t.CLIPVisionConfig(**small, image_size=224, patch_size=16)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 9}
    text = t.LlamaConfig(vocab_size=16000, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=False, **sizes)
    token = tokenizer.convert_tokens_to_ids("<image>")
    model = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=token))
    return model, t.LlavaProcessor(images, tokenizer, chat_template=template, **options)


def made_data(kind: str, folder: Path, count: int, length: int) -> str:
    """Noisy photographs of 256 × 256: in folders of two classes, or with conversations that fill the length."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(count):
        place = folder / "images" / ("even" if number % 2 == 0 else "odd") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(place)
    if kind != "llava":
        return str(folder / "images")
    turns = [{"from": "human", "value": f"<image>\n{'x' * length}"}, {"from": "gpt", "value": "one two three"}]
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("images/*/*.png"))]
    (folder / "data.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    return str(folder / "data.json")


class PeakFromHere:
    """What `train` takes for scoring: its check comes once the model is loaded."""

    def check(self, model, tokenizer) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, model, tokenizer) -> None:
        pass


def measure(case: dict) -> None:
    """Three steps on examples that fill `max_length`, in this process; prints the peak."""
    from doratune.cli.output import keep_freed_memory

    keep_freed_memory()
    from doratune.evaluation.evaluate import after_training  # noqa: F401 (what the command loads)
    from doratune.training.recipe import TrainRecipe
    from doratune.training.train import train

    with tempfile.TemporaryDirectory() as name:
        folder, case = Path(name), dict(case)
        kind, model = case.pop("made", None), case.pop("folder", None)
        settings = {"max_steps": 3, "tensorboard": False, "output": f"{folder}/run", "device": "cpu"}
        if kind:
            settings |= {
                "model": model,
                "train_on_prompt": kind == "llava",
                "data": made_data(kind, folder, 48, case.get("max_length", 0)),
            }
        else:
            (folder / "data.json").write_text(json.dumps([{"instruction": "count " * (3 * case["max_length"]), "input": ""} | {
                "output": "one two three"} for _ in range(32)]))  # fmt: skip
            settings |= {"data": str(folder / "data.json"), "train_on_prompt": True}
        print(train(TrainRecipe(**settings, **case), lambda line: None, score=PeakFromHere())["peak_bytes"])


def plan(case: dict) -> dict:
    from doratune.planning import Planner, PlanSettings

    case, kind = dict(case), case.get("made")
    settings = {"model": case.pop("folder")} if case.pop("made", None) else {}
    settings |= {"classes": 2} if kind in ("vit", "resnet") else {}
    return Planner(PlanSettings(**settings, **case, device="cpu", largest="none")).plan().to_dict()


def run(cases: list[dict], result: Path, command: str, models: Path) -> None:
    from doratune.support.environment import environment
    from doratune.support.files import write_json

    rows = []
    for case in cases:
        whole = case | ({"folder": str(models / case["made"])} if "made" in case else {})
        words = [sys.executable, __file__, "--measure", json.dumps(whole)]
        measured = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        planned = plan(whole)
        ratio = planned["total"] / measured
        row = {**case, "measured_bytes": measured, "planned_bytes": planned["total"], "ratio": ratio, "terms": planned["terms"]}
        rows.append(row)
        print(f"{case}: measured {measured / 2**20:.0f} MiB, planned {planned['total'] / 2**20:.0f} MiB, {ratio:.3f}", flush=True)
        write_json(result, {"command": command, "environment": environment(), "rows": rows})


def main() -> None:
    if sys.argv[1:] != ["--images"]:
        return run(TEXT, RESULTS / "planning_cpu.json", "python benchmarks/planning.py", Path())
    with tempfile.TemporaryDirectory() as name:
        for kind in dict.fromkeys(case["made"] for case in IMAGES):
            made_model(kind, Path(name) / kind)
        run(IMAGES, RESULTS / "planning_images_cpu.json", "python benchmarks/planning.py --images", Path(name))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
