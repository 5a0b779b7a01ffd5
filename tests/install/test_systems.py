"""Other systems and Pythons: no module, function or signal that one of them lacks, unless the code asks first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "src" / "doratune").rglob("*.py"))

POSIX_MODULES = {"fcntl", "resource", "readline", "termios", "tty", "pty", "pwd", "grp", "curses", "syslog", "posix", "crypt"}
POSIX_NAMES = {
    ("os", name)
    for name in ("fork", "forkpty", "getuid", "geteuid", "getgid", "chown", "chroot", "killpg", "setsid", "getloadavg", "uname")
    + ("sysconf", "sched_getaffinity", "mkfifo", "statvfs", "nice", "wait", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY")
} | {("signal", name) for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "SIGPIPE", "SIGCHLD", "pthread_kill")}
GONE_MODULES = {"imp", "distutils", "asyncore", "asynchat", "smtpd", "cgi", "pipes", "telnetlib", "imghdr", "sndhdr"}


class Uses(ast.NodeVisitor):
    """What a file uses without asking: not below a `try`, an `if` or a conditional expression."""

    def __init__(self):
        self.modules, self.names, self.asked = set(), set(), 0

    def _asking(self, node):
        self.asked += 1
        self.generic_visit(node)
        self.asked -= 1

    visit_Try = visit_If = visit_IfExp = visit_BoolOp = _asking

    def visit_FunctionDef(self, node):
        first = next((line for line in node.body if isinstance(line, ast.If)), None)
        if first is not None and isinstance(first.body[-1], ast.Return):  # a function that asks and goes
            return self._asking(node)
        return self.generic_visit(node)

    def visit_With(self, node):
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if any(getattr(call.func, "attr", "") == "suppress" for call in calls):
            return self._asking(node)
        return self.generic_visit(node)

    def visit_Import(self, node):
        self.modules |= set() if self.asked else {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        if not self.asked and not node.level:
            self.modules.add(node.module)
            self.names |= {(node.module, alias.name) for alias in node.names}

    def visit_Attribute(self, node):
        if not self.asked and isinstance(node.value, ast.Name):
            self.names.add((node.value.id, node.attr))
        self.generic_visit(node)


def uses(text: str) -> Uses:
    found = Uses()
    found.visit(ast.parse(text))
    return found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("import fcntl", True),
        ("try:\n    import fcntl\nexcept ModuleNotFoundError:\n    fcntl = None", False),
        ("import os\nos.fork()", True),
        ("import os\nif hasattr(os, 'fork'):\n    os.fork()", False),
        ("import signal\nx = signal.SIGKILL", True),
        ("def f():\n    import readline", True),
        ("import contextlib\nwith contextlib.suppress(ImportError):\n    import readline", False),
    ],
)
def test_the_check_sees_what_it_should(text, wrong):
    found = uses(text)
    assert bool(found.modules & POSIX_MODULES or found.names & POSIX_NAMES) == wrong


def test_nothing_of_one_system_alone():
    wrong = {}
    for path in FILES:
        found = uses(path.read_text(encoding="utf-8"))
        if bad := (found.modules & POSIX_MODULES) | (found.names & POSIX_NAMES):
            wrong[str(path.relative_to(ROOT))] = bad
    assert wrong == {}


def test_nothing_that_the_newest_python_has_no_more():
    """What the oldest has not yet, `make lint` sees: vermin knows since when each name and piece of grammar is there."""
    found = {str(path.relative_to(ROOT)): uses(path.read_text(encoding="utf-8")).modules & GONE_MODULES for path in FILES}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_every_text_file_names_its_encoding():
    """Python before 3.15 takes the system's: a code page on Windows."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = isinstance(node, ast.Call) and (getattr(node.func, "id", "") or getattr(node.func, "attr", ""))
            is_open = name == "open" and isinstance(node.func, ast.Name)
            is_method = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            if not (is_open or is_method) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            modes = [a.value for a in node.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if not any("b" in mode for mode in modes):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


AS_ON_WINDOWS = """
import os, signal, sys
import torch, datasets, accelerate, peft, matplotlib.pyplot, uvicorn  # they ask for themselves
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
for name in ("fcntl", "resource", "readline", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((os, ("fork", "geteuid", "getuid", "chown", "sysconf", "killpg", "setsid", "O_NOFOLLOW", "O_NONBLOCK")),
                      (signal, ("SIGKILL", "SIGHUP", "SIGALRM"))):
    for name in names:
        delattr(module, name)
import pkgutil, importlib, doratune
for module in pkgutil.walk_packages(doratune.__path__, "doratune."):
    if not module.name.endswith("__main__") and "triton" not in module.name:
        importlib.import_module(module.name)
from pathlib import Path
from doratune.comparison.launch import only_one
from doratune.support.environment import memory_bytes, peak_bytes
assert memory_bytes() > 2**28 and peak_bytes() >= 0
with only_one(Path(sys.argv[1])):
    pass
model = torch.nn.Sequential(torch.nn.Linear(5, 6))
doratune.attach(model, doratune.AdapterConfig(rank=2, targets=["0"]))
for _ in range(2):
    doratune.save(model, Path(sys.argv[1]) / "adapter")
doratune.load(torch.nn.Sequential(torch.nn.Linear(5, 6)), Path(sys.argv[1]) / "adapter", check_base=False)
from doratune.cli.main import main
assert main(["doctor"]) == 0
"""


def test_without_what_windows_lacks(tmp_path):
    """Every module loads, and an adapter is saved over another and loaded, in a Python without those modules and functions."""
    run = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
