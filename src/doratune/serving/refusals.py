"""What a client gets that asks for something wrong: an HTTP status and OpenAI's error object.

{"error": {"message": …, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}
"""

from __future__ import annotations

from starlette.responses import JSONResponse


class Refusal(Exception):
    """A request that is not answered; the message says what is wrong and what is expected."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def content(self) -> dict:
        return error(self.status, self.message, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}}
