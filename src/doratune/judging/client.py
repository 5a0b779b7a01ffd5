"""Calls of a judge through the `openai` client: any server that speaks chat completions.

The client itself tries again after timeouts, lost connections, 408, 409, 429 and 5xx, as long as a Retry-After says or longer each
time. What then still fails stops all calls with one line. The key is read from the environment and written nowhere.
Cost: one request a case, PARALLEL of them at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from ..errors import UserError
from ..support.values import number
from .cases import Case

KEYS = ("DORATUNE_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first that is set counts; a local server needs none."""


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is.

    Args:
        url: base address, e.g. https://api.openai.com/v1; model: its name there.
        retries: how often a call is tried again; timeout_s: of one try.
        max_tokens: of a judgment, 2,048 as published; temperature 0, as published.
    """

    url: str
    model: str
    retries: int = number(6, least=0)
    timeout_s: float = number(120.0, above=0)
    parallel: int = number(4, least=1)
    max_tokens: int = number(2048, least=1)


class Judge:
    """A judge that can be asked from several threads.

    Raises:
        UserError: an address that is none.
    """

    def __init__(self, settings: JudgeSettings):
        from openai import OpenAI

        if not settings.url.startswith(("http://", "https://")):
            raise UserError(f"judge is {settings.url!r}; expected an address such as http://localhost:8000/v1")
        self.settings = settings
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")
        self.client = OpenAI(api_key=key, base_url=settings.url, timeout=settings.timeout_s, max_retries=settings.retries)

    def ask(self, case: Case) -> str:
        """What the judge says to one case.

        Raises:
            UserError: it cannot be reached, refuses, or answers something that is no chat completion.
        """
        import openai

        where = f"the judge at {self.settings.url}"
        messages = [{"role": "system", "content": case.prompt.system}, {"role": "user", "content": case.text}]
        options = {"temperature": 0, "max_tokens": self.settings.max_tokens}
        try:
            reply = self.client.chat.completions.create(model=self.settings.model, messages=messages, **options)
        except openai.RateLimitError as error:
            raise UserError(f"{where} limits the rate still after {self.settings.retries} tries ({_said(error)})") from None
        except openai.APIStatusError as error:
            raise UserError(f"{where} answers {error.status_code} ({_said(error)})") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise UserError(f"{where} cannot be reached ({' '.join(str(reason).split())[:200] or type(reason).__name__})") from None
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{where} answers what is no chat completion ({' '.join(str(error).split())[:200]})") from None
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            raise UserError(f"{where} answers what is no chat completion; give the base address, which ends in /v1") from None
        return text if isinstance(text, str) else ""

    def ask_all(self, cases: Iterable[Case], take: Callable[[Case, str], None]) -> None:
        """Ask each case; `take` gets every judgment as it comes, one at a time.

        Raises:
            UserError: the first call that failed; the calls that were under way are waited for and taken.
        """
        stop, lock = threading.Event(), threading.Lock()

        def one(case: Case) -> None:
            if stop.is_set():
                return
            try:
                text = self.ask(case)
                with lock:
                    take(case, text)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self.settings.parallel) as pool:
            calls = [pool.submit(one, case) for case in cases]
            try:
                for call in as_completed(calls):
                    call.result()
            except BaseException:
                stop.set()
                raise


def _said(error) -> str:
    """The server's own words, on one line."""
    body = error.body if isinstance(getattr(error, "body", None), dict) else {}
    return " ".join(str(body.get("message") or error.message).split())[:200]
