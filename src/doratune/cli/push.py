"""`doratune push FOLDER --to OWNER/NAME`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse
from .output import print_json, say, say_next

EXAMPLE = "doratune push --folder runs/mine/adapter --to me/my-adapter --dry_run true"


@dataclass(kw_only=True)
class PushSettings:
    """Send an adapter or a merged model to a model hub: one commit of its weights, configs, tokenizer and card.

    Args:
        folder: adapter or model folder
        to: repository on the hub, owner/name; it is created where there is none
        private: of a repository that is created: only you see it
        results: output folders of doratune evaluate, whose scores go into the card first
        message: of the commit
        revision: branch of the commit; default: main
        dry_run: say what would be sent, and send nothing
    """

    folder: str = ""
    to: str = ""
    private: bool = True
    results: list[str] = field(default_factory=list)
    message: str | None = None
    revision: str | None = None
    dry_run: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(PushSettings, argv, "push", EXAMPLE)
    from pathlib import Path

    from ..errors import UserError
    from ..publishing.card import CARD, add_scores
    from ..publishing.push import described, parcel, push

    for name, what in (("folder", "FOLDER"), ("to", "OWNER/NAME")):
        if not getattr(settings, name):
            raise UserError(f"{name} is not set; give --{name} {what}")
    content = parcel(settings.folder)
    if settings.results and not settings.dry_run:
        add_scores(content.folder, [Path(result) for result in settings.results])
        content = parcel(settings.folder)
    for line in described(content):
        say(line)
    if CARD not in content.sent:
        say(f"note: {settings.folder} has no {CARD}; the hub shows it without a word")
    result = {"to": settings.to, "files": content.sent, "bytes": content.total_bytes, "commit": None}
    if settings.dry_run:
        say(f"dry run: nothing was sent to {settings.to}")
        say_next(("push", "--folder", settings.folder, "--to", settings.to))
    else:
        result["commit"] = push(settings.folder, settings.to, settings.private, settings.message, settings.revision)
        say(f"pushed to {result['commit']}")
    if as_json:
        print_json(result)
    return 0
