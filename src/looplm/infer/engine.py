"""Batched generation with a cache. Prompts of different lengths share a batch; those that finish leave it, and waiting
ones take their places."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from looplm.errors import ConfigError, DataError, LooplmError
from looplm.infer.decoders import EarlyExit, FullDepth, StopsEarly
from looplm.infer.sampling import Sampler, SamplingConfig
from looplm.model.cache_memory import check_cache_fits
from looplm.model.compiler import TURNS
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

# Dropping finished rows copies the whole cache: worth it once a quarter of the batch has finished.
SHRINK_BELOW = 0.75
MIN_CAPACITY = 64  # of a compiled model's cache; longer ones are a power of two, or one and a half times one


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt."""

    ids: list[int]
    """New tokens, EOS included."""
    stopped_by: Literal["eos", "length"]
    depths: list[int]
    """Loops run for each of them."""


OnToken = Callable[[int, int], None]  # (number of the prompt, token id)


@torch.inference_mode()
def generate(
    model: LoopedLM,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    n_loops: int | None = None,
    early: EarlyExit | None = None,
    sampling: SamplingConfig | None = None,
    batch_size: int | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt until EOS, `max_new_tokens` or the model's seq_len. Greedy unless `sampling` is given.
    With `early`, `n_loops` is the most that a token runs. At most `batch_size` prompts are in the batch, all if None;
    the others wait, and take the places of those that finish. The cache's rows are as long as the longest prompt needs.

    A model whose decoding is compiled (`LoopedLM.compile_decoding`) keeps its shapes: finished rows stay in the batch
    until others take their places, and the cache has one of a few capacities, all of which attention looks at.

    Raises:
        ConfigError: a number is too small, or the cache is larger than memory.
        DataError: a prompt is empty or fills the context.
        CheckpointError: logits are not finite.
    """
    loops = LoopPlan(model.config.n_loops if n_loops is None else n_loops).n_loops
    check_prompts(prompts, model=model, max_new_tokens=max_new_tokens)
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    if isinstance(eos_id, bool) or not isinstance(eos_id, int):
        raise ConfigError(f"eos_id is {eos_id!r:.60}; give an id, or -1 for none")
    check_kind("sampling", sampling, SamplingConfig)
    check_kind("early", early, EarlyExit)
    capacity = cache_capacity(model, max(map(len, prompts)), max_new_tokens)
    n_rows = min(batch_size or len(prompts), len(prompts))
    check_cache_fits(model, batch_size=n_rows, capacity=capacity, n_loops=loops)

    def new_decoder(n_rows: int, n_places: int) -> FullDepth:
        if early is None:
            return FullDepth(model, batch_size=n_rows, capacity=n_places, n_loops=loops)
        return StopsEarly(model, early, batch_size=n_rows, capacity=n_places, n_loops=loops)

    seq_len = model.config.seq_len
    texts = [_Text(list(prompt), len(prompt), min(len(prompt) + max_new_tokens, seq_len)) for prompt in prompts]
    sampler = Sampler(sampling or SamplingConfig(), n_rows=len(prompts), source=model.source)
    batch = _Batch(texts, new_decoder, capacity=capacity, sampler=sampler, eos_id=eos_id, on_token=on_token)
    waiting = deque(range(len(prompts)))
    while waiting or batch.active:
        n_entering = min(n_rows - len(batch.active), len(waiting))
        if n_entering:
            batch.admit([waiting.popleft() for _ in range(n_entering)])
        else:
            batch.step(shrink=not waiting)
    return [
        Generation(text.ids[text.n_prompt :], "eos" if text.ids[-1] == eos_id else "length", text.depths)
        for text in texts
    ]


@dataclass
class _Text:
    """One prompt and what was generated for it."""

    ids: list[int]
    n_prompt: int
    end: int  # tokens at which it ends without EOS
    depths: list[int] = field(default_factory=list)


class _Batch:
    """The texts that are gone on with together, one a row."""

    def __init__(
        self,
        texts: list[_Text],
        new_decoder: Callable[[int, int], FullDepth],
        *,
        capacity: int,
        sampler: Sampler,
        eos_id: int,
        on_token: OnToken | None,
    ) -> None:
        self.texts, self.new_decoder, self.capacity = texts, new_decoder, capacity
        self.sampler, self.eos_id, self.on_token = sampler, eos_id, on_token
        self.rows: list[int] = []  # which text each row is
        self.active: set[int] = set()  # texts in the batch that have not ended
        self.decoder: FullDepth | None = None

    @TURNS.forward()
    def admit(self, numbers: list[int]) -> None:
        """These texts join, in rows of texts that have ended, their first tokens chosen. Each prompt runs once, however
        many of them begin with it."""
        every = [tuple(self.texts[number].ids) for number in numbers]
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(every))}
        prompts = list(row_of)
        longest = max(map(len, prompts))
        if not self.active and len(numbers) >= len(self.rows):
            self.decoder = None  # its cache goes before the next one comes
        # those that join others need no more places than they have tokens; full, it would be compiled for this size
        decoder = self.new_decoder(len(prompts), self.capacity if self.decoder is None else longest + 1)
        logits = decoder.prefill(prompts)
        if len(prompts) < len(every):
            rows = torch.tensor([row_of[prompt] for prompt in every], device=logits.device)
            decoder.take_rows(rows)
            logits = logits[rows]
        if self.decoder is None:
            self.decoder, self.rows = decoder, list(numbers)
        else:
            free = [row for row, number in enumerate(self.rows) if number not in self.active][: len(numbers)]
            self.decoder.put(torch.tensor(free, device=logits.device), decoder, n_keys=longest)
            for row, number in zip(free, numbers, strict=True):
                self.rows[row] = number
        self.active |= set(numbers)
        self._take(numbers, logits, decoder.depths)

    @TURNS.forward()
    def step(self, *, shrink: bool) -> None:
        """One more token for every text. With `shrink`, rows that nobody will take are left out once they are many. An
        ended text still in its row runs its last token again, where the others are: harmless, nobody reads it."""
        decoder = self.decoder
        assert decoder is not None
        model, device = decoder.model, decoder.model.embed.weight.device
        is_compiled = model.one_token is not None
        if shrink and len(self.active) < SHRINK_BELOW * len(self.rows) and not is_compiled:
            kept = [row for row, number in enumerate(self.rows) if number in self.active]
            decoder.take_rows(torch.tensor(kept, device=device))
            self.rows = [self.rows[row] for row in kept]
        contexts = [self.texts[number].ids for number in self.rows]
        n_keys = self.capacity if is_compiled else max(len(self.texts[number].ids) for number in self.active)
        newest, ends = [ids[-1] for ids in contexts], [min(len(ids), n_keys) - 1 for ids in contexts]
        tokens, positions = torch.tensor([newest, ends], device=device)
        before = previous_ids([ids[-1 - model.n_back : -1] for ids in contexts], n_back=model.n_back).to(device)
        logits = decoder.step(tokens, positions, n_keys=n_keys, before=before)
        self._take(self.rows, logits, decoder.depths)

    def _take(self, numbers: list[int], logits: Tensor, depths: list[int]) -> None:
        """Choose the next token of these texts by logits (B, V)."""
        chosen = self.sampler.choose(logits, rows=numbers, contexts=[self.texts[number].ids for number in numbers])
        for number, token, depth in zip(numbers, chosen, depths, strict=True):
            if number not in self.active:
                continue
            text = self.texts[number]
            text.ids.append(token)
            text.depths.append(depth)
            if self.on_token is not None:
                self.on_token(number, token)
            if token == self.eos_id or len(text.ids) == text.end:
                self.active.remove(number)


def cache_capacity(model: LoopedLM, n_prompt: int, max_new_tokens: int) -> int:
    """Places of a cache for a prompt of n_prompt tokens and what follows: one of a few for a compiled model."""
    capacity = n_prompt + max_new_tokens
    if model.one_token is not None:
        capacity = max(capacity, MIN_CAPACITY)
        half = 2 ** (capacity - 1).bit_length() // 4  # of the power of two below
        capacity = -(-capacity // half) * half
    return min(capacity, model.config.seq_len)


def previous_ids(contexts: Sequence[Sequence[int]], *, n_back: int) -> Tensor:
    """The last n_back ids of each context (B, n_back), -1 where a context is shorter."""
    padded = [[-1] * n_back + list(context[-n_back:] if n_back else []) for context in contexts]
    return torch.tensor([row[len(row) - n_back :] for row in padded], dtype=torch.long).view(len(contexts), n_back)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is not a list of texts; one text alone would be taken for its letters."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise DataError(f"prompts are {texts!r:.60}; give a list of texts, for one text [text]")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"a prompt is {text!r:.60}; give a text")


def check_prompts(prompts: Sequence[Sequence[int]], *, model: LoopedLM, max_new_tokens: int) -> None:
    """Refuse what cannot be continued."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise DataError(f"prompts are {prompts!r:.60}; give a list of prompts, each a list of ids")
    if not prompts:
        raise DataError("no prompts were given")
    check_whole("max_new_tokens", max_new_tokens, error=DataError)
    n_ids = model.config.vocab_size
    for prompt in prompts:
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            raise DataError(f"a prompt is {prompt!r:.60}; give a list of ids (of a tensor: tensor.tolist())")
        if not prompt:
            raise DataError("the prompt is empty; give at least one token")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n_ids:
                raise DataError(f"a prompt holds {token!r:.60}, which is no id of this model: give 0 to {n_ids - 1}")
        if len(prompt) >= model.config.seq_len:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the model's context is {model.config.seq_len}: no room is "
                "left for an answer; shorten the prompt"
            )


def check_whole(name: str, value: int, *, error: type[LooplmError] = ConfigError) -> None:
    """Refuse what is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise error(f"{name} is {value!r:.60}; give 1 or more, a whole number")


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse what is neither None nor a `kind`."""
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r:.60}; give a {kind.__name__}")
