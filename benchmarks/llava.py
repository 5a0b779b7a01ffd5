"""Full fine-tuning, LoRA and DoRA of a small LLaVA on easy-vqa's real images and questions, with intervals.

    pip install easy-vqa
    python benchmarks/llava.py --output runs/llava_easy_vqa              # the best of four rates, 3 seeds
    python benchmarks/llava.py --output runs/llava_easy_vqa --methods full lora dora dvora    # goes on with a fourth
    python benchmarks/llava.py --output runs/powered --methods all --ranks 4 16 64 --seeds 5 \
        --spread 0.03 0.1 0.3 1 3 10                                       # docs/evidence.md
    python benchmarks/llava.py --output runs/smol --language smollm2-135m-instruct --dtype bfloat16    # on a GPU
    python benchmarks/llava.py --output runs/small --questions 300 --steps 5 --tower_epochs 0.5 --seeds 1 --test_items 20

No pretrained LLaVA can be had offline, so it is built as LLaVA is, of the training images alone. A small Llama learns the set's
questions, answers and captions as text (or `--language`: any causal language model). A CLIP image tower learns the images' 24
classes (shape × colour). Tower and projector then learn, through the frozen language model, to caption the images: the base. The
grid is `doratune compare` on the set's own questions in LLaVA's JSON, each method at the best of four rates by the loss on
questions that it does not see, scored on questions about the test images, drawn with seed 0. OUTPUT/base is the base,
OUTPUT/grid/base its own scores, OUTPUT/grid/compare.json the figures. Whatever was finished stays: the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from easy_vqa_set import classes, data_folder, image_path, questions_of, words_of
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from doratune.cli.output import keep_freed_memory
from doratune.comparison.grid import compare
from doratune.comparison.launch import only_one
from doratune.comparison.recipe import CompareRecipe
from doratune.data.image_reader import load_reader
from doratune.support.environment import environment
from doratune.support.files import replacing, write_json
from doratune.support.folders import whole_folder
from doratune.support.image_text import parts_of
from doratune.support.models import load_model, load_tokenizer
from doratune.training.examples import collator, read_examples
from doratune.training.recipe import TrainRecipe
from doratune.training.train import train

SIDE, PATCH = 32, 8
"""Pixels of an image's side, and of that of a patch: 16 tokens an image."""
TOWER = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
RATES = {
    "full": 1e-3, "lora": 3e-3, "dora": 3e-3, "dora_half": 3e-3, "magnitude_mix": 3e-3, "vera": 3e-2, "dvora": 3e-2,
    "prefix": 3e-2, "series": 3e-3, "parallel": 3e-3,
}  # fmt: skip
VARIANTS = {"series": {"method": "series", "baseline_size": 160}, "parallel": {"method": "parallel", "baseline_size": 40}}
"""Bottlenecks as wide as LoRA of rank 16 has numbers (163,840) in the small Llama."""
SPREAD = (0.1, 0.3, 1.0, 3.0)
"""Of a sweep: factors on each method's rate, where no others are given."""
BATCH = 32
ASKED = ("what is in the image?", "what does the image show?")
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
"""As short as one can be: `<image>what shape is it?` on a line, the answer and an end-of-text token on the next."""


def conversation(image: str, question: str, answer: str) -> dict:
    """An item of LLaVA's JSON."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def write_data(output: Path, questions: int, tested: int) -> dict[str, int]:
    """classes.csv, captions.json and train.json of the training images, easy_vqa.json of the test images; how many each holds."""
    data, draw = data_folder(), random.Random(0)
    asked = {split: questions_of(data, split) for split in ("train", "test")}
    told = classes(asked["train"])
    with replacing(output / "classes.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = [(image_path(data, "train", i), f"{colour} {shape}") for i, (shape, colour) in told.items()]
        csv.writer(file).writerows([("path", "label"), *rows])
    captions = [conversation(image_path(data, "train", i), draw.choice(ASKED), f"a {told[i][1]} {told[i][0]}") for i in told]
    drawn = {split: draw.sample(asked[split], min(n, len(asked[split]))) for split, n in (("train", questions), ("test", tested))}
    learned = [conversation(image_path(data, "train", i), q, a) for q, a, i in drawn["train"]]
    test = [{"image": image_path(data, "test", i), "question": q, "prompt": q, "answer": a} for q, a, i in drawn["test"]]
    for name, items in (("captions", captions), ("train", learned), ("easy_vqa", test)):
        write_json(output / f"{name}.json", items)
    return {"images": len(told), "train": len(learned), "test": len(test)}


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def vision_config() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=TOWER["hidden_size"], **TOWER)


def held_out(count: int) -> int:
    """Of so many items, those to evaluate the loss on."""
    return min(200, count // 5)


def write_tower(output: Path, images: int, epochs: float) -> Path:
    """The folder of a CLIP image tower that tells the 24 classes of so many training images."""
    run, start = output / "tower", output / "start-tower"
    if not (run / "metrics.json").is_file():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(vision_config=vision_config().to_dict(), projection_dim=TOWER["hidden_size"])
        with whole_folder(start, key="config.json") as temporary:
            transformers.CLIPForImageClassification(config).save_pretrained(temporary)
            image_processor().save_pretrained(temporary)
        settings = {
            "objective": "image_classification",
            "method": "full",
            "lr": 1e-3,
            "warmup_steps": 50,
            "eval_size": held_out(images),
        }
        train(recipe(run, model=str(start), data=str(output / "classes.csv"), epochs=epochs, **settings))
    return run / "model"


def recipe(run: Path, **settings) -> TrainRecipe:
    return TrainRecipe(output=str(run), overwrite=True, tensorboard=False, batch_size=BATCH, dtype="float32", **settings)


def write_language(output: Path, steps: int) -> Path:
    """The folder of a small Llama that has learned the training texts: a question and its answer; a caption, a question for it, and
    the caption again, so that it describes what stands in front."""
    folder = output / "language"
    if folder.is_dir():
        return folder
    turns = {name: [[turn["value"] for turn in item["conversations"]] for item in json.loads((output / f"{name}.json").read_text())]
             for name in ("train", "captions")}  # fmt: skip
    texts = [f"{question}\n{answer}" for question, answer in turns["train"]]
    texts += [f"{caption} {question}\n{caption}" for question, caption in turns["captions"]]
    texts = [text.replace("<image>\n", "") for text in texts]
    tokenizer = words_of(texts)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **LANGUAGE, **ends)
    model = transformers.LlamaForCausalLM(config)

    def loss(batch: list[str]) -> torch.Tensor:
        whole = tokenizer([f"{text} </s>" for text in batch], return_tensors="pt", padding=True)
        labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        return model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], labels=labels).loss

    learn("text", list(model.parameters()), texts, loss, steps)
    with whole_folder(folder, key="config.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def learn(name: str, parameters: list, rows: list, loss_of: Callable[[list], torch.Tensor], steps: int, lr: float = 1e-3) -> None:
    """So many steps of AdamW on random batches of the rows, the rate falling to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, (steps - step) / steps))
    for step, batch in zip(range(steps), batches(rows)):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name}, step {step}: loss {loss.item():.3f}", flush=True)


def batches(rows: list) -> Iterator[list]:
    """Endless batches in a random order."""
    draw = random.Random(0)
    while True:
        order = draw.sample(rows, len(rows))
        yield from (order[i : i + BATCH] for i in range(0, len(order), BATCH))


def blind_llava(tower: Path, language: str) -> tuple[transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor]:
    """(LLaVA of the tower and the language model, its projector drawn; its processor)."""
    speaking, tokenizer = load_model(language), load_tokenizer(language)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    speaking.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = transformers.LlavaConfig(
        vision_config=vision_config(), text_config=speaking.config, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=speaking.config.tie_word_embeddings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(speaking.model.state_dict())
    model.lm_head.load_state_dict(speaking.lm_head.state_dict())
    seeing = transformers.CLIPForImageClassification.from_pretrained(tower)
    model.model.vision_tower.load_state_dict(seeing.vision_model.state_dict())
    sizes = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, transformers.LlavaProcessor(image_processor(), tokenizer, chat_template=TEMPLATE, **sizes)


def write_base(output: Path, tower: Path, language: str, steps: int) -> Path:
    """The LLaVA that the grid begins with: tower and projector have learned to caption, through the frozen language model."""
    folder = output / "base"
    if folder.is_dir():
        return folder
    model, processor = blind_llava(tower, language)
    with whole_folder(output / "start", key="config.json") as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    captions = recipe(output / "captions", model=str(output / "start"), data=str(output / "captions.json"))
    reader = load_reader(captions.model)
    rows, collate = read_examples(captions, reader, print).rows, collator(captions, reader, model)
    model.requires_grad_(False)
    beside = [p for name in parts_of(model).beside for p in model.get_submodule(name).requires_grad_(True).parameters()]
    learn("captions", beside, rows, lambda batch: model(**collate(batch)).loss, steps, lr=2e-3)
    with whole_folder(folder, key="config.json") as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return folder


def grid_of(arguments: argparse.Namespace, base: Path) -> CompareRecipe:
    """The grid: the same questions, epochs and number of rates for every method; the projector stays as it is."""
    output = arguments.output
    return CompareRecipe(
        settings={
            "model": str(base), "data": str(output / "train.json"), "tasks": [str(output / "easy_vqa.json")],
            "eval_size": held_out(arguments.questions), "tasks_protocol": "generate", "tasks_batch_size": 64,
            "targets": "all-linear", "rank": arguments.rank, "epochs": arguments.epochs, "batch_size": BATCH,
            "max_length": 64, "dtype": arguments.dtype, "tensorboard": False,
        },
        methods=arguments.methods,
        variants={m: VARIANTS[m] for m in arguments.methods if m in VARIANTS},
        ranks=arguments.ranks,
        sweep_ranks="every",
        seeds=list(range(arguments.seeds)),
        method_lrs={m: [float(f"{RATES[m] * f:.3g}") for f in arguments.spread] for m in arguments.methods},
        score="generate",
        analyze=["q_proj", "v_proj"],
        output=str(output / "grid"),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/llava_easy_vqa"))
    parser.add_argument("--language", help="a causal language model instead of the small Llama; its rates are not RATES")
    parser.add_argument("--methods", nargs="+", choices=(*RATES, "all"), default=["full", "lora", "dora"])
    parser.add_argument("--questions", type=int, default=4000, help="about training images, the 200 to choose rates by among them")
    parser.add_argument("--test_items", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="several, each with a sweep of its own")
    parser.add_argument("--spread", type=float, nargs="+", default=SPREAD, help="of the sweep: factors on each method's rate")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tower_epochs", type=float, default=20)
    parser.add_argument(
        "--steps", type=int, default=300, help="of the language model on text, and of tower and projector on captions"
    )
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(argv)
    arguments.methods = list(RATES) if "all" in arguments.methods else arguments.methods
    keep_freed_memory()
    with only_one(arguments.output):  # a second start would write the base again while cells read it
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """What is missing of the base and the grid, and the figures."""
    counts = write_data(arguments.output, arguments.questions, arguments.test_items)
    tower = write_tower(arguments.output, counts["images"], arguments.tower_epochs)
    language = arguments.language or str(write_language(arguments.output, arguments.steps))
    base = write_base(arguments.output, tower, language, arguments.steps)
    summary = compare(grid_of(arguments, base))
    print(summary.text())
    if arguments.result:
        own = json.loads((arguments.output / "grid" / "base" / "results.json").read_text(encoding="utf-8"))["results"]
        held = {"items": counts, "base": own, "environment": environment()}
        write_json(arguments.result, held | {"summary": summary.to_dict()})


if __name__ == "__main__":
    main()
