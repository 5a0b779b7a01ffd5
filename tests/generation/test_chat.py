"""doratune chat through a pseudo-terminal: answers, history, other adapters, the base beside, Ctrl-C, Ctrl-D, bad commands."""

import os
import pty
import re
import select
import signal
import sys
import time

import psutil
import pytest
import torch
from test_generate import folders  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

import doratune


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *words):
        self.text = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in a shell's background
            os.execv(sys.executable, [sys.executable, "-m", "doratune.cli", "chat", *map(str, words)])

    def until(self, pattern: str, seconds: float = 600) -> str:
        """What came since the last call, up to the pattern."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"waited for {pattern!r}, got {self.text[-2000:]!r}"
            if select.select([self.file], [], [], 0.5)[0]:
                try:
                    data = os.read(self.file, 65536)
                except OSError:  # the other end is closed
                    data = b""
                assert data, f"ended before {pattern!r}: {self.text[-2000:]!r}"
                self.text += data.decode("utf-8", "replace").replace("\r", "")
        seen, self.text = self.text[: match.end()], self.text[match.end() :]
        return seen

    def say(self, line: str) -> str:
        """Type a line; the program's words up to the next prompt."""
        os.write(self.file, line.encode() + b"\n")
        return self.until(r"you> $|you> (?=\n)").replace(line, "", 1)

    def interrupt(self) -> None:
        os.write(self.file, b"\x03")

    def waits_for_a_key(self, seconds: float = 600) -> None:
        """Until the program sleeps at its prompt: readline notices a Ctrl-C before that only with the next key."""
        end = time.monotonic() + seconds
        while psutil.Process(self.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < end, "still busy at its prompt"
            time.sleep(0.05)

    def end(self) -> int:
        """The exit status."""
        end = time.monotonic() + 600
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.file)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"did not end: {self.text[-500:]!r}")
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    os.read(self.file, 65536)
                except OSError:
                    time.sleep(0.05)


@pytest.fixture
def reference(tiny_folder):
    """The greedy answer to a conversation, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def answer(adapter, *texts, system=None, new=6):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        if adapter is not None:
            doratune.load(model, adapter)
        messages = [{"role": "system", "content": system}] * (system is not None)
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=2)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


SHORT = ("--temperature", "0", "--max_new_tokens", "6")


def spoken(text: str, speaker: str) -> str:
    """What a speaker said; line ends of the terminal are kept as they are."""
    return text.split(f"{speaker}> ", 1)[1].rsplit("\nyou> ", 1)[0]


def shown(text: str) -> str:
    """A text as the terminal's reader here sees it."""
    return text.replace("\r", "")


def test_a_conversation(tiny_folder, folders, reference):  # noqa: F811
    chat = Terminal("--adapter", folders["one"], "--adapter", folders["two"], *SHORT)
    assert "/help" in chat.until("you> ")
    first = reference(folders["one"], "true")
    assert spoken(chat.say("true"), "one") == shown(first)
    second = reference(folders["one"], "true", first, "the answer")
    assert spoken(chat.say("the answer"), "one") == shown(second)  # with the history
    assert "(using two)" in chat.say("/use two")
    third = reference(folders["two"], "true", first, "the answer", second, "false")
    assert spoken(chat.say("false"), "two") == shown(third)
    assert "user: the answer" in chat.say("/history")
    assert "(forgotten)" in chat.say("/clear")
    chat.say("/system option1")
    assert spoken(chat.say("true"), "two") == shown(reference(folders["two"], "true", system="option1"))
    assert "* two" in chat.say("/adapters")
    _goes_on_after_what_is_wrong(chat)
    _leaves_out_the_oldest_turns(chat)
    os.write(chat.file, b"\x04")
    assert chat.end() == 0


def _goes_on_after_what_is_wrong(chat):
    assert "did you mean 'use'" in chat.say("/us one")
    assert "no adapter is named 'on'" in chat.say("/use on") and "/use needs a name" in chat.say("/use")
    assert "expected a number" in chat.say("/temperature warm") and "temperature is -1" in chat.say("/temperature -1")
    assert "more than the model's 256" in chat.say("true " * 300)
    chat.waits_for_a_key()
    chat.interrupt()
    assert "/quit ends" in chat.until("you> ")
    assert "two> " in chat.say("true")


def _leaves_out_the_oldest_turns(chat):
    chat.say("/clear")
    texts = [chat.say("true answer1 " * 15) for _ in range(5)]
    assert "no longer fit" not in texts[0] and "no longer fit" in texts[-1]


def test_the_base_beside_the_adapter(tiny_folder, folders, reference):  # noqa: F811
    chat = Terminal("--adapter", folders["one"], "--compare", *SHORT)
    chat.until("you> ")
    histories = {"base": ["true"], "one": ["true"]}
    for question in ("true", "the answer"):
        text = chat.say(question)
        parts = {"base": text.split("base> ", 1)[1].rsplit("\none> ", 1)[0], "one": spoken(text, "one")}
        for speaker, adapter in (("base", None), ("one", folders["one"])):
            history = histories[speaker] if question == "true" else [*histories[speaker], question]
            expected = reference(adapter, *history)
            assert parts[speaker] == shown(expected)
            histories[speaker] = [*history, expected]
    os.write(chat.file, b"/quit\n")
    assert chat.end() == 0


def test_ctrl_c_ends_an_answer_and_keeps_it(tmp_path, tiny_tokenizer):
    """A model with room for a long answer that never ends by itself: it says " false" or " answer", whichever has the sign."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=100_000, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    one, other = (tiny_tokenizer.convert_tokens_to_ids(token) for token in ("Ġfalse", "Ġanswer"))
    assert isinstance(one, int) and isinstance(other, int) and one != other
    with torch.no_grad():
        direction = model.lm_head.weight[one].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[one], model.lm_head.weight[other] = direction, -direction
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    chat = Terminal("--model", tmp_path / "base", "--temperature", "0", "--max_new_tokens", "50000")
    chat.until("you> ")
    os.write(chat.file, b"the answer\n")
    chat.until(r"base> ( ?(false|answer)){3}")  # while it is being written
    chat.interrupt()
    assert "(stopped)" in chat.until("you> ")
    assert re.search(r"assistant: +(false|answer)", chat.say("/history"))
    os.write(chat.file, b"\x04")
    assert chat.end() == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "neither model nor adapter"),
        (("--adapter", "nowhere"), "nowhere is not a folder"),
        (("--model", "MODEL", "--compare"), "compare needs an adapter"),
        (("--model", "MODEL", "--template", "plain", "--system", "x"), "system needs"),
        (("--model", "MODEL", "--top_p", "2"), "top_p is 2"),
    ],
)
def test_bad_settings(words, reason, tiny_folder, capsys):
    from doratune.cli.main import main

    assert main(["chat", *(str(tiny_folder) if word == "MODEL" else word for word in words)]) == 2
    assert reason in capsys.readouterr().err


def test_lines_from_a_pipe(tiny_folder, reference):
    import subprocess

    command = [sys.executable, "-m", "doratune.cli", "chat", "--model", str(tiny_folder), *SHORT]
    run = subprocess.run(command, input="true\n", capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and f"base> {reference(None, 'true')}\n" in run.stdout
