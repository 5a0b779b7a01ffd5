"""Completion in a real shell: commands, settings, choices, files."""

import shutil
import subprocess

import pytest

pytest.importorskip("shtab")

from doratune.cli.completion import script
from doratune.cli.description import described
from doratune.cli.main import COMMANDS, main

ASK = """
cd {folder}
source {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
function_name=$(complete -p doratune | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function_name" doratune "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    if not shutil.which("bash"):
        pytest.skip("no bash")
    path = tmp_path_factory.mktemp("completion") / "doratune.bash"
    path.write_text(script("bash"), encoding="utf-8")
    return path


def completions(bash_script, folder, *words):
    text = ASK.format(folder=folder, script=bash_script, words=" ".join(f"'{word}'" for word in ("doratune", *words)))
    result = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["tr"], {"train"}, {"merge"}),
        (["co"], {"compare", "convert", "completion"}, {"train"}),
        (["train", "--ra"], {"--rank"}, {"--lr"}),
        (["train", "--method", "d"], {"dora"}, {"lora", "full"}),
        (["train", "--schedule", ""], {"linear", "cosine", "constant"}, {"dora"}),
        (["merge", "--che"], {"--check", "--check_base"}, {"--adapter"}),
        (["evaluate", "--device", ""], {"auto", "cpu", "cuda", "mps"}, {"float32"}),
        (["export", "--to", ""], {"gguf", "lora"}, set()),
        (["train", "--data", "my"], {"my.jsonl"}, {"other.txt"}),
        (["report", "m"], {"my.jsonl"}, {"other.txt"}),
    ],
)
def test_bash(words, some, none, bash_script, tmp_path):
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "other.txt").touch()
    found = completions(bash_script, tmp_path, *words)
    assert some <= found and not none & found


def test_every_command_and_setting_is_completed(bash_script, tmp_path):
    import dataclasses

    assert set(COMMANDS) <= completions(bash_script, tmp_path, "")
    for command in COMMANDS:
        settings = described(command).settings
        wanted = {f"--{field.name}" for field in dataclasses.fields(settings)} if settings else {"--json"}
        assert wanted <= completions(bash_script, tmp_path, command, "--"), command


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_take_the_script(shell, tmp_path):
    text = script(shell)
    assert "doratune" in text and all(command in text for command in COMMANDS)
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_the_command_prints_it(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.strip() == script("bash").strip()
    assert main(["completion", "--shell", "fish"]) == 2
    assert "shell is 'fish'; expected one of bash, zsh, tcsh" in capsys.readouterr().err
