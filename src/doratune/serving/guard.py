"""Who may ask, and how much: a key, the address that was meant, a JSON body of a bounded size that arrives in time.

Without a key only this machine may ask, and only under its own name: a web page that has its own name resolved to this machine
would else read answers through its visitor's browser. A page cannot send JSON elsewhere without being allowed to, so other kinds of
bodies are refused too.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from starlette.requests import Request

from .refusals import Refusal

BODY_S = 60.0
"""In which a body must arrive."""

DRAINED = 16
"""A body that is too large is read, and dropped, up to so many times its limit: a client that still writes reads no answer."""


@dataclass(frozen=True)
class Guard:
    """Args:
    key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
    hosts: names under which this machine is meant; None: any.
    most_bytes: of a body.
    """

    key: str | None
    hosts: frozenset[str] | None
    most_bytes: int

    def admit(self, request: Request) -> None:
        """Raise Refusal for a request that may not ask."""
        if self.hosts is not None and _name(request.headers.get("host", "")) not in self.hosts:
            raise Refusal(403, "without a key this server is asked as 127.0.0.1 or localhost alone", code="wrong_host")
        if self.key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # bytes: text with other letters than ASCII's is not compared in constant time
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode()):
            problem = "no API key; send it as Authorization: Bearer KEY" if not key else "this API key is not the server's"
            raise Refusal(401, problem, code="invalid_api_key", WWW_Authenticate="Bearer")

    async def body(self, request: Request) -> bytes:
        """The bytes of a JSON body.

        Raises:
            Refusal: another kind (415), too many bytes (413), too slow (408).
            ClientDisconnect: the client is gone.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"content-type is {kind[:100]!r}; expected application/json")
        try:
            return await asyncio.wait_for(self._read(request), BODY_S)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_S:.0f} seconds") from None

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.most_bytes:
                parts.clear()
                if size > DRAINED * self.most_bytes:
                    break
            else:
                parts.append(part)
        if size > self.most_bytes:
            raise Refusal(413, f"the body has more than {self.most_bytes} bytes", Connection="close")
        return b"".join(parts)


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if ":" in host else host
