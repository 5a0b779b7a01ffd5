"""The endpoints, as an ASGI application.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/NAME   GET /health

A request's answers are jobs of the engine, which speaks in its own thread; what it says is handed to the event loop. A client that
goes away, waiting or in mid-stream, gives its jobs up, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as Endpoint

from ..errors import near_misses
from .batch import Job
from .bodies import Body, ChatBody, CompletionBody, read
from .choosing import Chooser
from .engine import Engine, EngineEnded, QueueFull
from .guard import Guard
from .prompts import Lengths, Prompts
from .refusals import Refusal, error
from .replies import Reply
from .words import Words


class Service:
    """What the endpoints share.

    Args:
        names: what a request may call a model → the adapter's name in the model, None for the base.
        listed: those of the names that /v1/models shows, the base first.
    """

    def __init__(self, engine: Engine, prompts: Prompts, lengths: Lengths, guard: Guard, names: dict, listed: list[str]):
        self.engine, self.prompts, self.lengths, self.guard = engine, prompts, lengths, guard
        self.names, self.listed = names, listed
        self.started = int(time.time())

    def app(self) -> Starlette:
        ways = [
            ("/v1/chat/completions", self._asked(ChatBody), "POST"),
            ("/v1/completions", self._asked(CompletionBody), "POST"),
            ("/v1/models", self._models, "GET"),
            ("/v1/models/{name:path}", self._model, "GET"),
            ("/health", self._health, "GET"),
        ]
        routes = [Endpoint(path, self._guarded(handler, path != "/health"), methods=[method]) for path, handler, method in ways]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_endpoint})

    def _guarded(self, handler, closed: bool):
        """A handler whose every failure is an answer in JSON."""

        async def run(request: Request) -> Response:
            try:
                if closed:
                    self.guard.admit(request)
                return await handler(request)
            except Refusal as refusal:
                return refusal.response()
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception:
                traceback.print_exc(file=sys.stderr)
                return JSONResponse(error(500, "the server failed; its log says more"), 500)

        return run

    async def _health(self, request: Request) -> Response:
        engine = self.engine
        state = {"status": "ok" if engine.alive else "failed", "running": engine.running, "waiting": len(engine.waiting)}
        return JSONResponse(state, 200 if engine.alive else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self.listed]})

    async def _model(self, request: Request) -> Response:
        self._known(name := request.path_params["name"])
        return JSONResponse(self._entry(name))

    def _entry(self, name: str) -> dict:
        base = self.names[name] is None
        own = {"id": name, "object": "model", "created": self.started, "owned_by": "doratune"}
        return own | {"parent": None if base else self.listed[0]}

    def _known(self, name: str) -> None:
        if name not in self.names:
            there = ", ".join(self.listed)
            message = f"no model is named {name[:100]!r}; there are {there}{near_misses(name[:100], self.names)}"
            raise Refusal(404, message, "model", "model_not_found")

    def _asked(self, cls: type[Body]):
        async def run(request: Request) -> Response:
            body = read(cls, await self.guard.body(request))
            self._known(body.model)
            ids = await self.prompts.of(body)
            answers = Answers(self, body, ids)
            return answers.stream() if body.stream else await answers.whole(request)

        return run


class Answers:
    """The jobs of one request, and what they say; made in the event loop.

    Raises:
        Refusal: a prompt that is too long, too many answers (400), too many that wait (429).
    """

    def __init__(self, service: Service, body: Body, ids: list[list[int]]):
        self.service, self.queue, self.loop = service, asyncio.Queue(), asyncio.get_running_loop()
        self.reply = Reply(body, sum(map(len, ids)), len(ids) * (body.n or 1))
        self.jobs = [self._job(body, row, prompt * (body.n or 1) + i) for prompt, row in enumerate(ids) for i in range(body.n or 1)]
        if len(self.jobs) > service.engine.most_waiting:
            raise Refusal(400, f"{len(self.jobs)} answers are asked for; at most {service.engine.most_waiting} can wait here", "n")
        try:
            service.engine.submit(self.jobs)
        except EngineEnded:
            raise Refusal(503, "the server ends", code="ended") from None
        except QueueFull:
            raise Refusal(429, "too many answers are waiting; try again", code="queue_full", Retry_After="1") from None

    def _job(self, body: Body, ids: list[int], index: int) -> Job:
        service, chat = self.service, isinstance(body, ChatBody)
        adapters = service.engine.adapters
        seed = None if body.seed is None else body.seed + index % (body.n or 1)
        temperature, top_p = 1.0 if body.temperature is None else body.temperature, body.top_p or 1.0
        return Job(
            ids=ids,
            adapter=service.names[body.model],
            chooser=Chooser(temperature, top_p, seed, adapters.model.device),
            words=Words(adapters.tokenizer, body.stops),
            longest=service.lengths.of(ids, body.longest, chat),
            say=lambda text, finish: self._hear(index, text, finish),
        )

    def _hear(self, index: int, text: str, finish: str | None) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, text, finish))

    async def said(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(answer, text, finish) as it comes, until all answers are finished.

        Raises:
            Refusal: one of them failed.
        """
        open_ones = len(self.jobs)
        while open_ones:
            index, text, finish = await self.queue.get()
            if finish == "failed":
                raise Refusal(500, text)
            open_ones -= finish is not None
            yield index, text, finish

    @property
    def tokens(self) -> int:
        return sum(job.tokens for job in self.jobs)

    def give_up(self) -> None:
        self.service.engine.give_up(self.jobs)

    async def whole(self, request: Request) -> Response:
        texts, finishes = [""] * len(self.jobs), [""] * len(self.jobs)

        async def collect() -> None:
            async for index, text, finish in self.said():
                texts[index] += text
                finishes[index] = finish or ""

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(request))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            tasks[0].result()
        finally:
            self.give_up()
            for task in tasks:
                task.cancel()
        return JSONResponse(self.reply.whole(texts, finishes, self.tokens))

    def stream(self) -> Response:
        return EventStream(self)

    async def events(self) -> AsyncIterator[str]:
        try:
            for event in self.reply.begin():
                yield event
            async for index, text, finish in self.said():
                for event in self.reply.piece(index, text, finish):
                    yield event
            for event in self.reply.end(self.tokens):
                yield event
        except Refusal as refusal:
            yield self.reply.error(refusal.content)


class EventStream(StreamingResponse):
    """Answers as server-sent events; given up when they end, however they end."""

    def __init__(self, answers: Answers):
        super().__init__(answers.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.give_up()


async def _gone(request: Request) -> None:
    """Until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_such_endpoint(request: Request, failure: HTTPException) -> Response:
    path = f"{request.method} {request.url.path}"[:200]
    words = {404: f"there is no {path}", 405: f"{path} is not allowed"}.get(failure.status_code, failure.detail)
    return JSONResponse(error(failure.status_code, words), failure.status_code, failure.headers)
