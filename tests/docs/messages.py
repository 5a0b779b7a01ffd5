"""Every text in the package's source, as a message shows it: `…` where a value is put in."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def texts() -> tuple[str, ...]:
    """All string constants and f-strings of src but documentation, each on one line."""
    found = []
    for path in sorted((ROOT / "src" / "doratune").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if (
                id(node) not in documentation
                and isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
                and (text := shown(node))
            ):
                found.append(" ".join(text.split()))
    return tuple(found)


def shown(node) -> str:
    """The text that an expression gives; "" where it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = shown(node.left), shown(node.right)
        return (left or "…") + (right or "…") if left or right else ""
    return ""


def exists(quote: str) -> bool:
    """Is this a message of the package, or a part of one? `…` in the quote stands where the source puts a value in."""
    return any(quote in text for text in texts())
