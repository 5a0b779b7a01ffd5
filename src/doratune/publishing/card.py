"""README.md of an adapter or a model folder: base, data, settings, figures, scores, versions, how to load it.

The head is the hub's metadata, written by huggingface_hub. Everything is read from what the folder and its run recorded: settings
that differ from the defaults, metrics.json, results.json of `doratune evaluate`. A card that somebody else wrote stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from yaml import YAMLError

from ..errors import UserError
from ..support.files import read_json, replacing
from ..support.image_heads import head_of
from ..support.own_models import is_own
from ..support.pipelines import is_pipeline, is_pipeline_adapter
from ..support.tables import markdown, placed

CARD = "README.md"
OURS = "<!-- written by doratune; without this line it is never written again -->"
SCORES = "scores"

NOT_SETTINGS = (
    *("model", "data", "output", "eval_data", "source", "expected", "resume", "overwrite", "mirror", "log_steps", "tensorboard"),
    *("class_images", "features", "report_to", "sample_prompts", "sample_steps", "sample_tokens"),
)
"""Recipe entries that say where a run read and wrote, or what a reader of the card has elsewhere."""


def write_training_card(folder: Path, settings: dict, defaults: dict, metrics: dict) -> None:
    """The card of a finished run's result.

    Args:
        folder: RUN/adapter or RUN/model. settings, defaults: of the recipe, by name. metrics: what metrics.json holds.
    """
    chosen = {k: v for k, v in settings.items() if k not in NOT_SETTINGS and v != defaults.get(k)}
    chosen |= {k: settings[k] for k in ("method", "rank", "lr", "batch_size") if k in settings}
    data = _data_names(settings["data"])
    parts = [
        f"`{_shown(settings['model'])}`, trained by doratune with method {settings['method']} on {data}.",
        loading(folder, settings["model"]),
        "## Training\n\n" + markdown(("setting", "value"), [(k, f"`{v}`") for k, v in sorted(chosen.items())]),
        markdown(("figure", "value"), _figures(metrics)),
        _versions(metrics.get("environment", {})),
    ]
    write(folder, metadata(folder, settings["model"], settings["data"], settings["method"]), parts)


def write_merged_card(
    folder: Path, base: str, adapter: str | Path, method: str, base_folder: Path | None = None, name: str = ""
) -> None:
    """The card of a model that an adapter was merged into; data and figures are those of the adapter's card, where it has one.

    Args:
        base_folder: where the base's files are; the licence of its card holds for what is made of it.
        name: of the model, where the folder is not called so yet.
    """
    text = f"`{_shown(base)}` with a {method} adapter merged into its weights: an ordinary model, no adapter code needed."
    head = metadata(folder, base, None, method, licence_of(base_folder))
    write(folder, head, [text, loading(folder, base), _training_of(Path(adapter))], name)


def write(folder: Path, head: str, parts: Sequence[str], name: str = "") -> None:
    """Put the card there, unless somebody else's is there."""
    card = folder / CARD
    if card.exists() and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        return
    place = folder.resolve()
    name = name or (place.parent.name if place.name in ("adapter", "model") else place.name)
    text = "\n\n".join([f"---\n{head}\n---", OURS, f"# {name}", *filter(None, parts), f"<!-- {SCORES} -->\n<!-- /{SCORES} -->"])
    with replacing(card) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def metadata(folder: Path, base: str, data: str | list | None, method: str, licence: str | None = None) -> str:
    """The hub's YAML: only names that can be a hub's are given as such."""
    from huggingface_hub import ModelCardData

    datasets = [name for name in ([data] if isinstance(data, str) else data or []) if isinstance(name, str) and _is_hub_name(name)]
    return ModelCardData(
        base_model=base if _is_hub_name(base) else None,
        base_model_relation=None if not _is_hub_name(base) else "adapter" if _is_any_adapter(folder) else "finetune",
        datasets=datasets or None,
        license=licence,
        library_name=_library(folder),
        pipeline_tag="text-to-image" if opens_in_diffusers(folder) else None,
        tags=list(dict.fromkeys(["doratune", method])),
    ).to_yaml()


def _library(folder: Path) -> str:
    if opens_in_diffusers(folder):
        return "diffusers"
    return "peft" if opens_in_peft(folder) else "doratune" if is_adapter(folder) else "transformers"


def _is_any_adapter(folder: Path) -> bool:
    return is_adapter(folder) or is_pipeline_adapter(folder)


def licence_of(folder: Path | None) -> str | None:
    """The licence that a model folder's card names."""
    from huggingface_hub.repocard import metadata_load

    if folder is None or not (folder / CARD).is_file():
        return None
    with contextlib.suppress(ValueError, OSError, YAMLError):
        named = (metadata_load(folder / CARD) or {}).get("license")
        return named if isinstance(named, str) else None
    return None


def loading(folder: Path, base: str) -> str:
    """How the folder is opened, as code."""
    name, labels = _class_of(folder)
    if opens_in_diffusers(folder):
        own = f'pipe = DiffusionPipeline.from_pretrained("{"THIS" if is_pipeline(folder) else _shown(base)}")'
        return _code("from diffusers import DiffusionPipeline", "", own, *_adapter_lines(folder))
    if is_own(name):
        result = ', "THIS"' if is_adapter(folder) else ""
        lines = ["from doratune.checkpoint.base_model import load_base", ""]
        lines.append(f'model = load_base("{_shown(base) if result else "THIS"}"{result})')
        return _code(*(["import doratune", *lines, 'doratune.load(model, "THIS")'] if result else lines))
    if not is_adapter(folder):
        return _code(f"from transformers import {name}", "", f'model = {name}.from_pretrained("THIS")')
    new_head = f", id2label={labels}, ignore_mismatched_sizes=True" if labels else ""
    own = f'model = {name}.from_pretrained("{_shown(base)}"{new_head})'
    lines = ["import doratune", f"from transformers import {name}", "", own, 'doratune.load(model, "THIS")']
    if opens_in_peft(folder):
        lines += ["", "# or with PEFT", "from peft import PeftModel", 'model = PeftModel.from_pretrained(model, "THIS")']
    return _code(*lines)


def opens_in_diffusers(folder: Path) -> bool:
    """Is it a pipeline, or a pipeline's adapter?"""
    return is_pipeline(folder) or is_pipeline_adapter(folder)


def _adapter_lines(folder: Path) -> list[str]:
    """How a pipeline gets its adapter; nothing for a merged one."""
    if is_pipeline(folder):
        return []
    if any(folder.glob("*.safetensors")):
        return ['pipe.load_lora_weights("THIS")']
    parts = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    return ["import doratune", *(f'doratune.load(pipe.{part}, "THIS/{part}")' for part in parts)]


def _class_of(folder: Path) -> tuple[str, dict[int, str]]:
    """(the class of transformers that opens what the folder is of, the labels that an adapter's head is for)."""
    with contextlib.suppress(UserError, KeyError, TypeError, IndexError, ValueError, AttributeError):
        if is_adapter(folder):
            record = read_json(folder / "doratune.json", "an adapter folder of ours has it")["model"]
            name = record["class"]
            labels = {int(i): label for i, label in record["settings"].get("id2label", {}).items()}
        else:
            name, labels = read_json(folder / "config.json", "a model folder needs it")["architectures"][0], {}
        if is_own(name):
            return name, {}
        if (head := head_of(name)) is not None:
            return head.auto, labels
    return "AutoModelForCausalLM", {}


def _code(*lines: str) -> str:
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def opens_in_peft(folder: Path) -> bool:
    """Does the folder say a type that PEFT knows?"""
    with contextlib.suppress(UserError):
        kind = read_json(folder / "adapter_config.json", "an adapter folder needs it").get("peft_type")
        return kind in ("LORA", "VERA", "LOHA", "LOKR")
    return False


def add_scores(folder: Path, results: Sequence[Path]) -> None:
    """Put the figures of `doratune evaluate` folders into the card.

    Raises:
        UserError: no card, no results.json, or a card without the place for scores.
    """
    card = folder / CARD
    if not card.is_file():
        raise UserError(f"{folder} has no {CARD} to put scores into; train or merge into it again, or write one")
    rows = [row for path in results for row in _score_rows(Path(path))]
    head = ("task", "protocol", "items", "accuracy", "standard error")
    text = placed(card, SCORES, "## Scores\n\n" + markdown(head, rows))
    with replacing(card) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _score_rows(folder: Path) -> list[tuple[str, ...]]:
    path = folder / "results.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder} holds no results.json; give the output folder of doratune evaluate")
    found = read_json(path, "doratune evaluate writes it").get("results")
    if not isinstance(found, list):
        raise UserError(f"{path} is no results.json of doratune evaluate")
    return [
        (r["task"], r["protocol"], str(r["total"]), f"{100 * r['accuracy']:.1f} %", f"{100 * r['standard_error']:.1f}")
        for r in found
    ]


def _figures(metrics: dict) -> list[tuple[str, str]]:
    known = (
        ("trained numbers", "trainable", "{:,}"),
        ("examples", "examples", "{:,}"),
        ("steps", "steps", "{:,}"),
        ("last training loss", "final_loss", "{:.4f}"),
        ("evaluation loss", "eval_loss", "{:.4f}"),
        ("training time, s", "seconds", "{:.0f}"),
    )
    return [(words, form.format(metrics[key])) for words, key, form in known if metrics.get(key) is not None]


def _versions(environment: dict) -> str:
    versions = {name: version for name, version in environment.get("versions", {}).items() if version}
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else ""


def _training_of(adapter: Path) -> str:
    """The section of the adapter's own card on its training."""
    with contextlib.suppress(OSError):
        text = (adapter / CARD).read_text(encoding="utf-8")
        if OURS in text and "## Training" in text:
            return "## Training" + text.partition("## Training")[2].partition(f"<!-- {SCORES}")[0].rstrip()
    return ""


def _data_names(data: str | list) -> str:
    return ", ".join(f"`{_shown(str(name))}`" for name in ([data] if isinstance(data, str) else data))


def _shown(name: str) -> str:
    """A hub's name; of a path its last part alone: a card tells nobody how a user's disk looks."""
    return name if _is_hub_name(name) else Path(name).name


def _is_hub_name(name: str) -> bool:
    """owner/name, and nothing of that name on this disk."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
