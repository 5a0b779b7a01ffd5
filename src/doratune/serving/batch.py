"""The rows that are being written, of all adapters together: each step gives every row one token, a row that is done makes room at
once for one that waits (continuous batching).

    admit   the prompts of new rows, in one pass of their own, then their keys and values beside the others'
    step    one token for each row, whatever its adapter

Not transformers' own continuous batching: it packs all requests into one row, where an adapter would have to be chosen for each
token; one setting decides for all requests whether tokens are drawn, and one seed; and it shares the keys and values of equal
beginnings of prompts, which differ from adapter to adapter. Here `doratune.mixed` chooses by row.

Cost: one forward of the model a step; each layer's own product once, and each adapter's part for its rows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from ..adapter import routes
from ..adapter.several import record_named
from ..errors import UserError
from ..evaluation.generate import left_pad
from ..generation.adapters import NamedAdapters
from ..generation.sampling import ends_of
from ..support.models import contiguous_head
from .choosing import Chooser, next_tokens
from .memory import Memory
from .words import Words


@dataclass(eq=False)
class Job:
    """One answer to be written.

    Args:
        ids: the prompt's tokens; adapter: its name in the model, None for the base.
        say: takes each (text, finish): finish is None while more comes, then stop or length, or failed with the reason as text.
    """

    ids: list[int]
    adapter: str | None
    chooser: Chooser
    words: Words
    longest: int
    say: Callable[[str, str | None], None]
    tokens: int = 0
    gone: bool = False
    finish: str | None = field(default=None)

    def take(self, token: int | None, ends: frozenset[int]) -> None:
        """The next token, or None where the model's scores are no numbers."""
        if token is None:
            self.fail("the model's scores are NaN; try --dtype float32")
            return
        self.tokens += 1
        text = "" if token in ends else self.words.add(token)
        if token in ends or self.words.stopped:
            self.finish = "stop"
        elif self.tokens >= self.longest:
            self.finish = "length"
        if self.finish:
            text += self.words.close()
            self.finish = "stop" if self.words.stopped else self.finish
        if text or self.finish:
            self.say(text, self.finish)

    def fail(self, reason: str) -> None:
        self.finish = "failed"
        self.say(reason, "failed")


class Batch:
    """Rows of one model; use it in the thread that made it, inside `opened`.

    Args:
        way: where the rows go (`doratune.mixed`).
    """

    def __init__(self, model, tokenizer, way: routes.Destination):
        self.model, self.way = model, way
        self.ends = frozenset(ends_of(model, tokenizer))
        self.pad = tokenizer.pad_token_id or 0
        self.takes = set(inspect.signature(model.forward).parameters)
        self.jobs: list[Job] = []
        self.memory = Memory()
        self.last: list[int] = []

    @torch.no_grad()
    def admit(self, jobs: list[Job]) -> None:
        """Begin these answers: their first tokens."""
        fresh, scores = self.read([job.ids for job in jobs], [job.adapter for job in jobs])
        tokens = next_tokens(scores, [job.chooser for job in jobs])
        self.memory.join(fresh)  # all or nothing
        self.jobs, self.last = [*self.jobs, *jobs], [*self.last, *(token or 0 for token in tokens)]
        for job, token in zip(jobs, tokens, strict=True):
            job.take(token, self.ends)
        self.drop()

    @torch.no_grad()
    def step(self) -> None:
        """One more token of each answer."""
        scores = self.go_on([job.adapter for job in self.jobs], self.last, self.memory)
        tokens = next_tokens(scores, [job.chooser for job in self.jobs])
        self.last = [token or 0 for token in tokens]
        for job, token in zip(self.jobs, tokens, strict=True):
            job.take(token, self.ends)
        self.drop()

    def drop(self) -> None:
        """Make room: answers that are finished, or that nobody waits for any more."""
        stay = [i for i, job in enumerate(self.jobs) if not (job.finish or job.gone)]
        self.memory.keep(stay)
        self.jobs, self.last = [self.jobs[i] for i in stay], [self.last[i] for i in stay]

    def fail(self, jobs: list[Job], reason: str) -> None:
        """Give up these answers."""
        for job in jobs:
            if not job.finish:
                job.fail(reason)
        self.drop()

    def read(self, rows: list[list[int]], adapters: list[str | None]) -> tuple[Memory, Tensor]:
        """(the memory of these prompts, the scores (B, V) behind each)."""
        ids, mask = left_pad(rows, self.pad, self.model.device)
        cache, scores = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), None, adapters)
        return Memory(cache, mask), scores

    def go_on(self, adapters: list[str | None], last: list[int], memory: Memory) -> Tensor:
        """The scores (B, V) behind each row's last token, which is put into the memory."""
        positions = memory.positions[:, None]
        memory.grow()
        ids = torch.tensor(last, device=self.model.device)[:, None]
        memory.cache, scores = self._forward(ids, memory.mask, positions, memory.cache, adapters)
        return scores

    def _forward(self, ids, mask, positions, cache, adapters):
        self.way.choose(adapters)
        more = {"position_ids": positions, "logits_to_keep": 1}
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=DynamicCache() if cache is None else cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in self.takes},
        )
        return out.past_key_values, out.logits[:, -1]


@contextlib.contextmanager
def opened(adapters: NamedAdapters) -> Iterator[Batch]:
    """A batch of all adapters, in the block and in this thread.

    Raises:
        UserError: an adapter or a model whose examples cannot be told apart in a batch.
    """
    model = adapters.load_all().eval()
    names = list(adapters.inside.values())
    for name, inner in adapters.inside.items():
        if record_named(model, inner).also_train:
            raise UserError(
                f"adapter {name!r} trains whole modules (also_train), which a batch with others cannot have; merge it with "
                f"doratune merge --adapter {adapters.folders[name]} and serve that folder as --model"
            )
    with contiguous_head(model), routes.mixed(model, names or [None]) as way:
        batch = Batch(model, adapters.tokenizer, way)
        check(batch, [None, *names, None])
        yield batch


@torch.no_grad()
def check(batch: Batch, adapters: list[str | None]) -> None:
    """Rows of a batch must be what they are alone: one short prompt for each adapter, of different lengths, joined one by one.

    Raises:
        UserError: they are not: a memory that is no keys and values, positions that cannot be said, layers that see no batch.
    """
    try:
        vocabulary = batch.model.get_input_embeddings().num_embeddings
        rows = [[(7 * i + j) % vocabulary for j in range(2 + 3 * i % 7)] for i in range(len(adapters))]
        joined, alone = Memory(), []
        for row, adapter in zip(rows, adapters, strict=True):
            single = batch.read([row], [adapter])[0]
            joined.join(Memory(copy.deepcopy(single.cache), single.mask))
            alone.append(batch.go_on([adapter], row[:1], single)[0])
        together = batch.go_on(adapters, [row[0] for row in rows], joined)
        errors = [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(alone, together, strict=True)]
        wrong = None if all(error < 0.1 for error in errors) else f"scores differ by {max(errors):.2g}"
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        wrong = " ".join(str(error).split())[:200] or type(error).__name__
    if wrong:
        name = type(batch.model).__name__
        raise UserError(f"rows of a batch of {name} are not what they are alone ({wrong}); use doratune chat or doratune generate")
