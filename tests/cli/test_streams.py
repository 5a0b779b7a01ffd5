"""Standard output and error that take nothing, or not every character: an exit status and at most one line, never a traceback."""

import contextlib
import os
import subprocess
import sys

import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIGHT = (["--help"], ["--version"], ["merge", "--help"], ["doctor", "--help"], ["completion", "--help"])


def run(arguments, **streams):
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, "timeout": 120} | streams
    return subprocess.run([sys.executable, "-m", "doratune", *arguments], **settings)


@contextlib.contextmanager
def closed_pipe():
    """The writing end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("arguments", [*LIGHT, ["doctor"]], ids=" ".join)
def test_a_reader_that_has_gone(arguments):
    with closed_pipe() as pipe:
        result = run(arguments, stdout=pipe)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["trian"], 2), (["merge"], 2), (["merge", "--adpater", "x"], 2), (["train", "no/such.yaml"], 2), (["merge", "--help"], 0)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_nobody_reads_the_errors(arguments, status):
    with closed_pipe() as pipe:
        assert run(arguments, stderr=pipe).returncode == status


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_a_full_disk_below_standard_output(arguments):
    with open("/dev/full", "wb") as full:
        result = run(arguments, stdout=full)
    assert result.returncode == 2
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("doratune") and "No space left on device; free some space" in line


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor of the new process")
@pytest.mark.parametrize("descriptor", [1, 2])
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["merge", "--help"], 0), (["trian"], 2)])
def test_a_stream_that_is_closed(arguments, status, descriptor):
    result = run(arguments, preexec_fn=lambda: os.close(descriptor))
    assert result.returncode == status and b"Traceback" not in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("command", ["analyze", "report", "export"])
def test_an_encoding_that_lacks_characters(command, encoding):
    """As in a Windows code page: ΔM is not in it."""
    result = run([command, "--help"], env=ENVIRONMENT | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert (result.returncode, result.stderr) == (0, b"")
    if command == "analyze":
        assert ("ΔM" in result.stdout.decode(encoding)) == (encoding == "utf-8")


def test_help_lists_nothing_that_is_refused(capsys):
    """Each option that any command's help shows is one that the command knows."""
    import re

    from doratune.cli.main import COMMANDS, main

    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = set(re.findall(r"(?<![\w-])--[\w-]+\+?", capsys.readouterr().out.partition("example:")[0]))
        for option in shown - {"--help", "--json", "--SETTING"}:
            known = not main([command, f"{option}=\x00", "--no_such_setting", "x"])
            error = capsys.readouterr().err
            assert known or f"unknown setting {option}" not in error, (command, option)
            assert not option.endswith("+"), (command, option)
