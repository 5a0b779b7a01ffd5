"""VL-BART's answers and captions, scored as published: VQA's soft accuracy, the very text, CIDEr.

    results.json            accuracy with standard error (of captions: CIDEr, 1.0 is what is published as 100), chance, majority
    TASK.generate.jsonl     an item a line: what was asked, the right answers, the output, its score

A task is a source of `data/visual_tasks/`, its part val where it has parts. The features come from the image tower that the model
was trained on. The average over tasks is that of the paper's Tables 2 and 3. Padding is masked everywhere: in float32 the score
does not depend on the batch size. Cost: writing, at most TOKENS tokens an item; the tower's pass over what has no features yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from ...adapter.attach import record_of
from ...checkpoint.adapter import load
from ...checkpoint.base_model import load_base
from ...checkpoint.quantized import recorded_quantization
from ...data.visual_features.extract import features_of
from ...data.visual_features.settings import FeatureSettings
from ...data.visual_tasks import load_visual_items, parsed, tasks
from ...errors import UserError
from ...support.devices import device_of
from ...support.environment import peak_bytes
from ...support.files import write_json
from ...support.folders import whole_folder
from ...support.image_towers import ImageTower
from ...support.models import load_tokenizer
from ...support.own_models import is_own
from ...support.vl_bart import VisualInput, is_vl_bart
from ...training.visual_rows import SeenItem, VisualCollator, prompt_ids
from ..captions import caption_scorer
from ..evaluate import refuse_spoiled, write_items
from ..generate import only_these
from ..seen import figures_of
from ..summary import overall, table
from . import Scorer

PROTOCOL = "generate"
TOKENS = 20
"""Longest output, as published."""

SeenTask = tuple[str, list[SeenItem]]


class SeenScorer(Scorer):
    objective = "vl_bart"
    protocols = (PROTOCOL,)

    def scores(self, class_name: str, model_type: str) -> bool:
        return is_own(class_name) and is_vl_bart(class_name)

    def after_training(self, recipe, say, progress):
        return ScoredItems(recipe, say, progress)

    def evaluate(self, settings, model: str, say, progress) -> dict:
        if settings.protocol not in ("both", "all", PROTOCOL):
            raise UserError(f"protocol is {settings.protocol}, but VL-BART writes its answers; set protocol: {PROTOCOL}")
        names = _names([settings.task] if isinstance(settings.task, str) else settings.task)
        seeing, tokenizer, facts = load_both(settings, model)
        unusable: list[str] | None = [] if settings.bad_items == "skip" else None
        seen = _seen_tasks(names, seeing, settings, settings.limit, unusable)
        if unusable:
            say(f"{len(unusable)} unusable items skipped (the first: {unusable[0]})")
        sizes = (settings.batch_size, settings.beams or 1, settings.max_new_tokens or TOKENS)
        return score_seen(seeing, tokenizer, seen, sizes, Path(settings.output), unusable, progress) | {"method": facts}

    def show(self, summary: dict) -> str:
        lines = [table(summary["results"] + summary["averages"], summary["peak_bytes"])]
        captions = [r for r in summary["results"] if "cider" in r]
        return "\n".join([*lines, *(f"{r['task']}: CIDEr {100 * r['cider']:.1f}, {r['right']} word for word" for r in captions)])


class ScoredItems:
    """Scores the model that a training run ends with, into OUTPUT/scores/after; its tasks are read before the training."""

    def __init__(self, recipe, say, progress):
        self.recipe, self.say, self.progress = recipe, say, progress
        self.names, self.seen, self.unusable = _names(recipe.tasks), [], None
        for source in self.names.values():
            load_visual_items(source, "val", [])

    def check(self, model, tokenizer) -> None:
        self.unusable = [] if self.recipe.bad_items == "skip" else None
        self.seen = _seen_tasks(self.names, model, self.recipe, self.recipe.tasks_limit, self.unusable)

    def __call__(self, model, tokenizer) -> None:
        folder, sizes = Path(self.recipe.output) / "scores" / "after", (self.recipe.tasks_batch_size, 1, TOKENS)
        self.say(SCORER.show(score_seen(model, tokenizer, self.seen, sizes, folder, self.unusable, self.progress)))


def _names(sources: Sequence[str]) -> dict[str, str]:
    """Name → source of each task.

    Raises:
        UserError: two of one name.
    """
    names: dict[str, str] = {}
    for source in sources:
        task, place, split, _ = parsed(source)
        name = "-".join(filter(None, (task.name if task else place.stem, split)))
        if name in names:
            raise UserError(f"two tasks are called {name!r}; evaluate them one by one")
        names[name] = source
    return names


def _seen_tasks(names: dict[str, str], model, settings, limit: int | None, unusable: list[str] | None) -> list[SeenTask]:
    """The items of each task with their features, of the tower that the model was trained on.

    Raises:
        UserError: another tower, items that cannot be read, none at all.
    """
    visual = VisualInput.of(model.config)
    tower = ImageTower(settings.image_tower or visual.tower, device_of(settings.device), settings.trust_remote_code)
    if visual.fingerprint and tower.fingerprint != visual.fingerprint:
        raise UserError(f"{tower.name} is not the image tower that the model was trained on ({visual.tower}); give --image_tower")
    sizes = {name: getattr(visual, name) for name in ("cells", "frames", "frame_rate")}
    reading = FeatureSettings(image_tower=tower.name, features=settings.features, **sizes)
    seen = []
    for name, source in names.items():
        skipped: list[str] = []
        items = load_visual_items(source, "val", None if unusable is None else skipped)[:limit]
        features = features_of(items, name, tower, reading, unusable is not None)
        usable = features.usable(items, skipped)
        if skipped and (unusable is None or not usable):
            raise UserError(skipped[0] if unusable is None else f"{source} holds no item that can be used; the first: {skipped[0]}")
        if unusable is not None:
            unusable += skipped
        if any(tasks()[item.task].scored == "caption" for item in usable):
            caption_scorer()  # missed now, not after the training
        seen.append((name, [SeenItem(item, features) for item in usable]))
    return seen


def load_both(settings, name: str):
    """(VL-BART with the settings' adapter, its tokenizer, (base model, method, rank))."""
    recorded = recorded_quantization(settings.adapter) if settings.adapter else None
    quantize = (recorded or "none") if settings.quantize == "recorded" else settings.quantize
    model = load_base(name, settings.adapter, settings.dtype, quantize, settings.trust_remote_code)
    if quantize == "none":
        model.to(device_of(settings.device))
    tokenizer = load_tokenizer(name, settings.trust_remote_code)
    if not settings.adapter:
        return model, tokenizer, (name, None, None)
    config = record_of(load(model, settings.adapter, check_base=settings.check_base)).config
    return model.eval(), tokenizer, (name, config.method, config.rank)


def score_seen(model, tokenizer, seen: Sequence[SeenTask], sizes, output: Path | None, unusable, progress) -> dict:
    """Score a model that is loaded: {"results": […], "averages": […], "peak_bytes": …}, and the same as files.

    Args:
        sizes: items at once, beams, the most tokens of an output.

    Raises:
        UserError: parameters that are NaN or infinite.
    """
    refuse_spoiled(model)
    was_training = model.training
    model.eval()
    scored = [(name, *_score_task(model, tokenizer, name, items, sizes, progress)) for name, items in seen]
    model.train(was_training)
    results = [result for _, result, _ in scored]
    summary = {"results": results, "averages": list(filter(None, [overall(results)])), "peak_bytes": peak_bytes()}
    if unusable is not None:
        summary["unusable"] = unusable
    if output is not None:
        with whole_folder(output, key="results.json") as folder:
            for name, _, records in scored:
                write_items(folder / f"{name}.{PROTOCOL}.jsonl", records)
            write_json(folder / "results.json", summary)
    return summary


def _score_task(model, tokenizer, name: str, seen: list[SeenItem], sizes, progress) -> tuple[dict, list[dict]]:
    """(figures, a record for each item)."""
    started = time.perf_counter()
    with progress(name, len(seen)) as advance:
        texts = written(model, tokenizer, seen, *sizes, advance)
    figures, records = figures_of([one.item for one in seen], texts)
    seconds = time.perf_counter() - started
    speed = {"seconds": seconds, "items_per_second": len(seen) / max(seconds, 1e-9)}
    return {"task": name, "protocol": PROTOCOL} | figures | speed, records


@torch.no_grad()
def written(model, tokenizer, seen: Sequence[SeenItem], batch_size: int, beams: int, tokens: int, advance) -> list[str]:
    """What the model writes about each item, in their order; items of like length at once."""
    collate = VisualCollator(tokenizer.pad_token_id, model.config.decoder_start_token_id)
    settings = GenerationConfig(
        max_new_tokens=tokens,
        num_beams=beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )
    most = model.config.max_position_embeddings
    ids = [prompt_ids(one.item, tokenizer, most) for one in seen]
    order = sorted(range(len(seen)), key=lambda i: (seen[i].item.task, -len(ids[i])))
    texts = [""] * len(seen)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [dict(zip(("visual_features", "visual_places"), seen[i].inputs())) | {"input_ids": ids[i]} for i in batch]
        inputs = {name: t.to(model.device) for name, t in collate.inputs(rows).items()}
        with only_these(model):
            out = model.generate(**inputs, generation_config=settings)
        for i, text in zip(batch, tokenizer.batch_decode(out, skip_special_tokens=True)):
            texts[i] = text.strip()
        advance(len(batch))
    return texts


SCORER = SeenScorer()
