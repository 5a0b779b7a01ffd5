"""YAML of recipes, grids and run folders: the one place of the package where YAML is read and written.

What a file unfolds to is counted before anything is built: a few lines of aliases can name gigabytes, and brackets in
brackets end in Python's recursion limit. 1e-3 is a number here (YAML 1.1 takes it for text) and a date stays text, as on the
command line. Source: the events of PyYAML's parser. Cost: a second pass over the text, some milliseconds for a recipe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .text import read_text

NODES, DEPTH, CHARACTERS = 100_000, 50, 10_000_000
"""The most values, levels and characters of a document, with every alias unfolded."""

_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NUMBER = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


def _resolvers(resolvers: dict) -> dict:
    """PyYAML's rules for plain words, with our rule for numbers and none for dates."""
    other = {first: [r for r in rules if r[0] not in (_FLOAT, _TIMESTAMP)] for first, rules in resolvers.items()}
    return {first: [*other.get(first, []), *([(_FLOAT, _NUMBER)] if first in "-+0123456789." else [])] for first in other}


class RepeatedKey(yaml.YAMLError):
    """A mapping that names a key twice, of which PyYAML would keep the last silently."""

    def __init__(self, key: str, mark):
        super().__init__(f"{key!r} stands there twice; leave one of the two")
        self.problem, self.problem_mark = str(self), mark


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def compose_mapping_node(self, anchor):
        """The mapping as it is written, before `<<` brings in keys that it may have too."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise RepeatedKey(key.value, key.start_mark)
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader or PyYAML's own would take for something else."""

    yaml_implicit_resolvers = {
        first: [*rules, *_resolvers(yaml.SafeDumper.yaml_implicit_resolvers)[first]]
        for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


class TooLarge(yaml.YAMLError):
    """A document that unfolds beyond the limits; `problem` and `problem_mark` as PyYAML's errors have them."""

    def __init__(self, problem: str, mark=None):
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: malformed, larger than the limits, or a value that Python cannot hold.
    """
    try:
        _measure(text)
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # a number of 5,000 digits, base 60 beyond a float
        raise TooLarge(f"a value that cannot be read: {str(error)[:100]}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        UserError: no such file, not text, malformed, or larger than the limits; with the line where there is one.
    """
    try:
        return parse_yaml(read_text(path))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{path}{where}: not a readable YAML file ({' '.join(str(reason).split())})") from None


def to_yaml(value: Any, flow: bool = False) -> str:
    """The value as YAML that `parse_yaml` reads back; `flow`: on one line.

    Raises:
        yaml.YAMLError: a value that is no plain data.
    """
    if flow:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=2**31)
        return text.removesuffix("...\n").strip()
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_read_back(value: Any) -> Any:
    """What a file would give back for this value: tuples are lists, for instance."""
    return parse_yaml(to_yaml(value))


def _measure(text: str) -> None:
    """Count values and levels from the parser's events, each alias as large and as deep as what it names."""
    if len(text) > CHARACTERS:
        raise TooLarge(f"{len(text):,} characters; expected at most {CHARACTERS:,}")
    sizes: dict[str, tuple[int, int]] = {}
    open_nodes = [[None, 0, 0]]  # [anchor, values below, levels below] from the document down to here

    def close(anchor, size: int, levels: int, mark) -> None:
        if anchor:
            sizes[anchor] = size, levels
        parent = open_nodes[-1]
        parent[1], parent[2] = parent[1] + size, max(parent[2], levels + 1)
        if sum(node[1] for node in open_nodes) > NODES:
            raise TooLarge(f"its aliases unfold to more than {NODES:,} values", mark)
        if len(open_nodes) + levels > DEPTH:
            raise TooLarge(f"more than {DEPTH} levels of lists in lists", mark)

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(node[0] == event.anchor for node in open_nodes):
                raise TooLarge(f"*{event.anchor} holds itself", event.start_mark)
            close(None, *sizes.get(event.anchor, (1, 0)), event.start_mark)
        elif isinstance(event, yaml.ScalarEvent):
            close(event.anchor, 1, 0, event.start_mark)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1, 0])
            if len(open_nodes) > DEPTH:
                raise TooLarge(f"more than {DEPTH} levels of lists in lists", event.start_mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, levels = open_nodes.pop()
            close(anchor, size, levels, event.start_mark)
