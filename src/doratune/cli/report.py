"""`doratune report RUN …`: one self-contained HTML page about training runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse
from .inputs import refuse_missing
from .output import keep_freed_memory, print_json, say, say_next

EXAMPLE = "doratune report runs/dora runs/lora --output report.html"


@dataclass(kw_only=True)
class ReportSettings:
    """One page, with nothing outside of it: settings, curves, scores with intervals, costs, ΔM and ΔD, sample outputs, warnings.

    Args:
        runs: folders of doratune train, or of doratune compare; also the words after the command
        output: the page
        title: of the page; default: the names of the runs
        analysis: ΔM and ΔD: auto measures them (loads the base model), none leaves them out, else a folder of doratune analyze
        modules: last names of the weights that are measured (the paper takes query and value); none: all
        overwrite: replace a page that doratune report wrote
    """

    runs: list[str] = field(default_factory=list)
    output: str = "report.html"
    title: str = ""
    analysis: str = "auto"
    modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    overwrite: bool = False


def main(argv: list[str]) -> int:
    settings, as_json = parse(ReportSettings, argv, "report", EXAMPLE, words="runs")
    keep_freed_memory()
    from pathlib import Path

    from ..report.page import build

    refuse_missing({}, {"runs": settings.runs})
    facts = build(
        [Path(run) for run in settings.runs],
        Path(settings.output),
        title=settings.title,
        analysis=settings.analysis,
        modules=settings.modules,
        overwrite=settings.overwrite,
        say=say,
    )
    runs, warnings = (f"{len(facts[key])} {key[:-1] if len(facts[key]) == 1 else key}" for key in ("runs", "warnings"))
    say(f"{runs}, {facts['points']:,} points, {warnings}: {settings.output} ({facts['bytes'] / 1e6:.1f} MB)")
    if adapter := next((run for run in map(Path, settings.runs) if (run / "adapter" / "adapter_config.json").is_file()), None):
        say_next(
            ("merge", "--adapter", adapter / "adapter", "--output", "merged"),
            ("push", "--folder", adapter / "adapter", "--to", "OWNER/NAME"),
        )
    if as_json:
        print_json(facts)
    return 0
