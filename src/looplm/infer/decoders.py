"""How a batch of texts goes on by a token: every loop for every token, or only those that an exit rule asks for.

Shapes: B texts, T tokens, D width; R texts that still run loops, W tokens of each, J of them judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor

from looplm.config import did_you_mean
from looplm.errors import ConfigError
from looplm.infer.exits import ExitRule
from looplm.model.cache import Behind
from looplm.model.compiler import TURNS
from looplm.model.loop.exit import check_last_state
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import CompiledParts, LoopedLM
from looplm.model.partial import Ran, coda_slots, core_slots

Missing = Literal["recompute", "last"]


@dataclass(frozen=True)
class EarlyExit:
    """A rule by which tokens stop, and how the keys come to be of the loops that they left out."""

    rule: ExitRule
    missing: Missing = "recompute"
    """recompute: a token runs a loop that it left out once a later token of its text runs it, beside that one. All keys
    of the loops are then those of full depth, and the only error is in the stopped token's own output; a coda keeps the
    keys of the state in which the token stopped.
    last: the keys of its last loop stand in for those of all later ones. Nothing is made up for; later tokens err by
    what the loops left out would still have changed in these keys: nothing for a state that has settled. Within a
    prompt a token stops only once all before it have."""

    def __post_init__(self) -> None:
        known = get_args(Missing)
        if self.missing not in known:
            raise ConfigError(
                f"no policy {self.missing!r} for missing keys{did_you_mean(self.missing, known)} "
                f"Policies: {', '.join(known)}."
            )

    @classmethod
    def parse(cls, rule: str, *, missing: str | None = None) -> "EarlyExit":
        """A rule as `ExitRule.parse` reads it, and a policy, `recompute` where none is named."""
        return cls(ExitRule.parse(rule), cast(Missing, missing or "recompute"))

    def __str__(self) -> str:
        return f"{self.rule}, {self.missing}"


class FullDepth:
    """The cached forward, with the same loops for every token."""

    def __init__(self, model: LoopedLM, *, batch_size: int, capacity: int, n_loops: int) -> None:
        self.model, self.plan = model, LoopPlan(n_loops)
        self.cache = model.new_cache(batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        self.depths = [n_loops] * batch_size
        """Loops behind the newest logits of each text."""

    @TURNS.forward()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run all prompts into the empty cache; logits (B, n_targets) after the last token of each.

        Short prompts are padded on the right. The padding's keys lie beyond the text's length, where no query looks
        before decoding has overwritten them.
        """
        longest = max(map(len, prompts))
        device = self.model.embed.weight.device
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        positions = torch.arange(longest, device=device).expand_as(ids)
        return self._advance(ids, positions, [len(prompt) - 1 for prompt in prompts], n_keys=longest, before=None)

    @TURNS.forward()
    def step(self, tokens: Tensor, positions: Tensor, *, n_keys: int, before: Tensor) -> Tensor:
        """Logits (B, n_targets) after one more token (B,) of every text, at `positions` (B,)."""
        last = [0] * len(tokens)
        return self._advance(tokens[:, None], positions[:, None], last, n_keys=n_keys, before=before)

    def take_rows(self, rows: Tensor) -> None:
        """These texts, in this order, once each or often."""
        self.cache.take_rows(rows)
        self.depths = [self.depths[row] for row in rows.tolist()]

    def put(self, rows: Tensor, new: Self, *, n_keys: int) -> None:
        """The texts of `new`, of at most `n_keys` tokens, in place of those in `rows`."""
        self.cache.put(rows, new.cache, n_keys=n_keys)

    def _advance(
        self, ids: Tensor, positions: Tensor, last: list[int], *, n_keys: int, before: Tensor | None
    ) -> Tensor:
        """Logits after token number `last` of each text, for ids (B, T) at `positions`; what follows it is padding."""
        where: dict[str, Any] = {"cache": self.cache, "positions": positions, "n_keys": n_keys, "before": before}
        if ids.shape[1] == 1:
            return self.model(ids, plan=self.plan, **where).logits[:, 0, : self.model.config.n_targets]
        return self._logits(self.model.hidden(ids, plan=self.plan, **where), last)

    def _logits(self, hidden: Tensor, last: list[int]) -> Tensor:
        """Of the ids that may be sampled, for hidden states (B, T, D)."""
        of_last = hidden[:, 0] if hidden.shape[1] == 1 else hidden[range(len(last)), last]
        return self.model.logits(of_last)[:, : self.model.config.n_targets]


class PartialDepth(FullDepth):
    """A cached forward whose tokens need not run the same loops: it keeps of each what later loops need.

    Raises:
        ConfigError: the model has an exit of its own, or a backout, which reads the last loop's stream.
    """

    def __init__(self, model: LoopedLM, *, batch_size: int, capacity: int, n_loops: int) -> None:
        check_last_state("running fewer loops needs", exit=model.exit, has_backout=model.backout is not None)
        super().__init__(model, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        self.capacity, weight = capacity, model.embed.weight
        at = torch.arange(capacity + 1, device=weight.device).repeat(batch_size, 1)  # + 1: padding reads and writes it
        first, entry, state = (weight.new_zeros(*at.shape, model.config.d_model) for _ in range(3))
        self.tokens = Behind(torch.zeros_like(at), at, first, entry, state)

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        self.tokens = self.tokens.each(lambda tensor: tensor[rows])

    def put(self, rows: Tensor, new: Self, *, n_keys: int) -> None:
        super().put(rows, new, n_keys=n_keys)
        self.tokens.put(rows, new.tokens, n_keys=n_keys)

    def _parts(self, n_keys: int) -> LoopedLM | CompiledParts:
        """What single tokens go through."""
        model = self.model
        return model if model.one_token is None or n_keys != self.capacity else model.one_token

    def _hidden(self, at: Tensor, *, n_keys: int, rows: Tensor | None = None) -> Tensor:
        """What coda and norm make of the states of the tokens at places (R, W) of the texts `rows` (R,), or of all."""
        model = self.model
        each = torch.arange(len(at), device=at.device) if rows is None else rows
        if not model.config.n_coda:
            return model.norm(model.inject.read_out(self.tokens.state[each[:, None], at]))
        here = self.tokens.each(lambda tensor: tensor[each[:, None], at])
        inputs = model.inputs(here.ids, positions=at, n_keys=n_keys)
        inputs.first = here.first
        return model.leave(model.inject.read_out(here.state), inputs, coda_slots(model, self.cache, rows=rows))


@dataclass
class _Call:
    """The new tokens of one call, by text and number among the T of it."""

    at: list[list[int]]  # their places
    running: dict[int, list[int]]  # those that have not stopped; where all wait for one to stop, that one first
    kept: Tensor  # (B, T + 1, n) what the rule remembers; the last one is scratch


class StopsEarly(PartialDepth):
    """The cached forward, each token up to the loop at which its rule fires. Texts that have stopped are not computed
    while others run on, and none depends on what its batch mates do."""

    def __init__(self, model: LoopedLM, early: EarlyExit, *, batch_size: int, capacity: int, n_loops: int) -> None:
        super().__init__(model, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        early.rule.check(model)
        self.rule, self.recomputes = early.rule, early.missing == "recompute"
        self.n_kept = self.rule.n_kept(model.config.d_head_out)
        self.late: list[dict[int, list[int]]] = [{} for _ in range(batch_size)]
        """Of each text, the places of tokens that stopped, by the loop that they run next."""

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        self.late = [{loop_idx: [*places] for loop_idx, places in self.late[row].items()} for row in rows.tolist()]

    def put(self, rows: Tensor, new: Self, *, n_keys: int) -> None:
        super().put(rows, new, n_keys=n_keys)
        for row, late in zip(rows.tolist(), new.late, strict=True):
            self.late[row] = late

    def _advance(
        self, ids: Tensor, positions: Tensor, last: list[int], *, n_keys: int, before: Tensor | None
    ) -> Tensor:
        model, n_loops, n_tokens = self.model, self.plan.n_loops, ids.shape[1]
        parts = self._parts(n_keys) if n_tokens == 1 else model
        n_run = min(n_loops, self.rule.first_loop)
        where: dict[str, Any] = {"cache": self.cache, "tokens": self.tokens, "n_keys": n_keys}
        ran = parts.begin(ids, n_loops=n_run, positions=positions, before=before, **where)
        running = {text: list(range(end + 1)) for text, end in enumerate(last)}
        if self.recomputes:
            running = {text: numbers[::-1] for text, numbers in running.items()}
        kept = torch.full((len(ids), n_tokens + 1, self.n_kept), torch.nan, device=ids.device)
        call = _Call(positions.tolist(), running, kept)
        columns, hidden = torch.tensor(self._judged(call), device=ids.device).clamp(max=n_tokens - 1), ran.hidden
        if n_run < n_loops:
            if hidden is None and self.rule.reads_logits:
                hidden = self._hidden(positions, n_keys=n_keys)
            logits = self._judge(call, ran, hidden, columns, n_run=n_run)
            if n_tokens == 1 and logits is not None and not call.running:
                return logits[:, : model.config.n_targets]
        is_over = not call.running or n_run == n_loops
        while call.running and n_run < n_loops:
            self._one_loop(call, loop_idx=n_run, parts=parts, where=where)
            n_run += 1
        for text in call.running:
            self.depths[text] = n_loops
        if hidden is None or not is_over:
            hidden = self._hidden(positions, n_keys=n_keys)
        return self._logits(hidden, last)

    def _one_loop(self, call: _Call, *, loop_idx: int, parts: LoopedLM | CompiledParts, where: dict[str, Any]) -> None:
        """The next loop for the tokens that run, and beside them for the late ones of their texts."""
        texts, device = list(call.running), call.kept.device
        late = [self.late[text].pop(loop_idx, []) for text in texts]
        places = [
            [call.at[text][number] for number in call.running[text]] + others
            for text, others in zip(texts, late, strict=True)
        ]
        width = max(map(len, places))
        at = torch.tensor([each + [self.capacity] * (width - len(each)) for each in places], device=device)
        rows = None if len(texts) == len(self.late) else torch.tensor(texts, device=device)
        parts = self.model if width > 1 or rows is not None else parts
        ran = parts.go_on(at, first=loop_idx, n_loops=loop_idx + 1, rows=rows, **where)
        if loop_idx == self.plan.n_loops - 1:
            return
        for text, others in zip(texts, late, strict=True):
            self._leave_behind(text, others, loop_idx + 1)
        hidden = ran.hidden
        if hidden is None and self.rule.reads_logits:  # the coda keeps what late tokens had as they stopped
            lengths = torch.tensor([[len(numbers)] for numbers in call.running.values()], device=device)
            is_running = torch.arange(int(lengths.max()), device=device) < lengths
            at = torch.where(is_running, at[:, : is_running.shape[1]], self.capacity)
            hidden = self._hidden(at, n_keys=where["n_keys"], rows=rows)
        columns = torch.arange(len(self._judged(call)[0]), device=device).expand(len(texts), -1)
        self._judge(call, ran, hidden, columns, n_run=loop_idx + 1)

    def _judged(self, call: _Call) -> list[list[int]]:
        """Numbers of the tokens that the rule looks at, a row per running text, padded with T."""
        n_judged = 1 if self.recomputes else max(map(len, call.running.values()))
        scratch = call.kept.shape[1] - 1
        return [numbers[:n_judged] + [scratch] * (n_judged - len(numbers)) for numbers in call.running.values()]

    def _judge(self, call: _Call, ran: Ran, hidden: Tensor | None, columns: Tensor, *, n_run: int) -> Tensor | None:
        """Let tokens stop, `n_run` loops run: what is known (R, W) of the running texts and their hidden states
        (R, W, D); the tokens to be judged are at `columns` (R, J). Their logits (R * J, V), where it reads them."""
        texts, device = list(call.running), columns.device

        def judged(each: Tensor) -> Tensor:
            alone = each.shape[1] == 1
            return (each if alone else each[torch.arange(len(columns), device=device)[:, None], columns]).flatten(0, 1)

        logits, done, kept = (
            None,
            None if ran.done is None else judged(ran.done),
            call.kept.new_empty(columns.numel(), 0),
        )
        if self.rule.reads_logits:
            assert hidden is not None
            logits = self.model.logits(judged(hidden))
        if self.n_kept:
            at = torch.tensor(texts, device=device)[:, None], torch.tensor(self._judged(call), device=device)
            kept = call.kept[at].flatten(0, 1)
        fires, new = self.rule.fires(judged(ran.change), logits, kept, done)
        if self.n_kept:
            call.kept[at] = new.view(*columns.shape, -1)
        stopped: list[tuple[int, int]] = []
        for text, fired in zip(texts, fires.view(len(texts), -1).tolist(), strict=True):
            running = call.running[text]
            n_stop = len(list(takewhile(bool, fired[: len(running)])))
            if self.recomputes and n_stop:
                n_stop = len(running)
            places = [call.at[text][number] for number in running[:n_stop]]
            stopped += [(text, place) for place in places]
            call.running[text] = running[n_stop:]
            if not call.running[text]:
                del call.running[text]
                self.depths[text] = n_run
            if self.recomputes:
                self._leave_behind(text, places, n_run)
        if stopped and not self.recomputes:
            self._repeat_keys(stopped, n_run)
        return logits

    def _leave_behind(self, text: int, places: list[int], loop_idx: int) -> None:
        if places:
            waiting = self.late[text].setdefault(loop_idx, [])
            there = set(waiting)  # a text that has ended may write over its last place again and again
            waiting += [place for place in places if place not in there]

    def _repeat_keys(self, stopped: list[tuple[int, int]], n_run: int) -> None:
        """What tokens (text, place) have in the slots of their last loop, in those of all later ones too."""
        rows, places = torch.tensor(stopped, device=self.tokens.ids.device).T
        for later in range(n_run, self.plan.n_loops):
            old_and_new = (core_slots(self.model, self.cache, loop_idx) for loop_idx in (n_run - 1, later))
            for old, new in zip(*old_and_new, strict=True):
                new.keys[rows, :, places] = old.keys[rows, :, places]
                new.values[rows, :, places] = old.values[rows, :, places]
