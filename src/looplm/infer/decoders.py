"""How a batch of texts goes on by a token: every loop for every token, or only those that an exit rule asks for.

Shapes: B texts, T tokens, D width, V logits; R texts that still run loops, W tokens of each, J of them judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from looplm.config import did_you_mean
from looplm.errors import ConfigError
from looplm.infer.exits import ExitRule
from looplm.model.cache import Behind, Slot, SlotRows
from looplm.model.layer_inputs import LayerInputs
from looplm.model.loop.exit import check_last_state
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

Missing = Literal["recompute", "last"]


@dataclass(frozen=True)
class EarlyExit:
    """A rule by which tokens stop, and how the keys come to be of the loops that they left out."""

    rule: ExitRule
    missing: Missing = "recompute"
    """recompute: a token runs a loop that it left out once a later token of its text runs it, beside that one. All keys
    are then those of full depth; the only error is in the stopped token's own output.
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

    def step(self, tokens: Tensor, positions: Tensor, *, n_keys: int, before: Tensor) -> Tensor:
        """Logits (B, n_targets) after one more token (B,) of every text, at `positions` (B,)."""
        last = [0] * len(tokens)
        return self._advance(tokens[:, None], positions[:, None], last, n_keys=n_keys, before=before)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these texts."""
        self.cache.keep_rows(rows)
        self.depths = [self.depths[row] for row in rows.tolist()]

    def _advance(
        self, ids: Tensor, positions: Tensor, last: list[int], *, n_keys: int, before: Tensor | None
    ) -> Tensor:
        """Logits after token number `last` of each text, for ids (B, T) at `positions`; what follows it is padding."""
        hidden = self.model.hidden(
            ids, plan=self.plan, cache=self.cache, positions=positions, n_keys=n_keys, before=before
        )
        return self._logits(hidden, last)

    def _logits(self, hidden: Tensor, last: list[int]) -> Tensor:
        """Of the ids that may be sampled, for hidden states (B, T, D)."""
        of_last = hidden[:, 0] if hidden.shape[1] == 1 else hidden[range(len(last)), last]
        return self.model.logits(of_last)[:, : self.model.config.n_targets]

    def _slots(self, loop_idx: int) -> list[Slot]:
        start = self.model.config.n_prelude + loop_idx * self.model.config.n_core
        return self.cache.slots[start : start + self.model.config.n_core]

    def _coda(self) -> list[Slot]:
        return self.cache.slots[len(self.cache.slots) - self.model.config.n_coda :]


@dataclass
class _Call:
    """The new tokens of one call, by text and number among the T of it."""

    at: list[list[int]]  # their places
    running: dict[int, list[int]]  # those that have not stopped; where all wait for one to stop, that one first
    kept: Tensor  # (B, T + 1, n) what the rule remembers; the last one is scratch

    @property
    def n_running(self) -> int:
        return sum(map(len, self.running.values()))


class StopsEarly(FullDepth):
    """The cached forward, each token up to the loop at which its rule fires. Texts that have stopped are not computed
    while others run on, and none depends on what its batch mates do. Exits begin with the second loop.

    Raises:
        ConfigError: the model has an exit of its own, or a backout, which reads the last loop's stream.
    """

    def __init__(self, model: LoopedLM, early: EarlyExit, *, batch_size: int, capacity: int, n_loops: int) -> None:
        check_last_state("an exit rule needs", exit=model.exit, has_backout=model.backout is not None)
        super().__init__(model, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
        self.rule, self.recomputes, self.capacity = early.rule, early.missing == "recompute", capacity
        weight = model.embed.weight
        at = torch.arange(capacity + 1, device=weight.device).repeat(batch_size, 1)  # + 1: padding reads and writes it
        first, entry, state = (weight.new_zeros(*at.shape, model.config.d_model) for _ in range(3))
        self.tokens = Behind(torch.zeros_like(at), at, first, entry, state)
        self.late: list[dict[int, list[int]]] = [{} for _ in range(batch_size)]
        """Of each text, the places of tokens that stopped, by the loop that they run next."""

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows)
        self.tokens = self.tokens.each(lambda tensor: tensor[rows])
        self.late = [self.late[row] for row in rows.tolist()]

    def _advance(
        self, ids: Tensor, positions: Tensor, last: list[int], *, n_keys: int, before: Tensor | None
    ) -> Tensor:
        model, n_loops, n_tokens = self.model, self.plan.n_loops, sum(last) + len(last)
        is_compiled = model.one_token is not None and ids.shape[1] == 1 and n_keys == self.capacity
        parts = model.one_token if model.one_token is not None and is_compiled else model
        slots, coda = self.cache.slots[: model.config.n_prelude], self._coda()
        x, inputs = parts.enter(
            ids, slots, positions=positions, n_keys=n_keys, documents=None, before=before, asides=None
        )
        entry, rows = model.inject.prepare(x), torch.arange(len(ids), device=ids.device)[:, None]
        call = self._call(positions, last)
        state: Tensor | None = None  # of all tokens, for as long as they all run, and no earlier ones beside them
        is_whole = True
        for loop_idx in range(n_loops):
            late = {text: self.late[text].pop(loop_idx, []) for text in call.running}
            if is_whole and (call.n_running < n_tokens or any(late.values())):
                is_whole = False
                self._store(rows, inputs, entry, state)
            if is_whole:
                number, old = torch.full_like(inputs.loop_idx, loop_idx), state
                state, _ = parts.loop_and_exit(old, entry, number, inputs, self._slots(loop_idx), None, is_last=False)
                if loop_idx < n_loops - 1 and (old is not None or call.kept.shape[-1]):
                    columns = torch.tensor(self._judged(call), device=ids.device).clamp(max=ids.shape[1] - 1)
                    hidden = self._hidden(state, inputs, coda)
                    self._judge(call, loop_idx, state if old is None else old, state, columns=columns, hidden=hidden)
            else:
                self._run_some(call, loop_idx, late, n_keys=n_keys)
            if not call.running:
                break
        if is_whole:
            self._store(rows, inputs, entry, state)
        for text in call.running:
            self.depths[text] = n_loops
        states = self.tokens.state[rows, positions]
        return self._logits(parts.leave(model.inject.read_out(states), inputs, coda), last)

    def _call(self, positions: Tensor, last: list[int]) -> _Call:
        n_rows, n_tokens = positions.shape
        n_kept = self.rule.n_kept(self.model.config.d_head_out)
        kept = torch.full((n_rows, n_tokens + 1, n_kept), torch.nan, device=positions.device)
        running = {text: list(range(end + 1)) for text, end in enumerate(last)}
        if self.recomputes:
            running = {text: numbers[::-1] for text, numbers in running.items()}
        return _Call(positions.tolist(), running, kept)

    def _run_some(self, call: _Call, loop_idx: int, late: dict[int, list[int]], *, n_keys: int) -> None:
        """One loop for the tokens that run, and beside them for the late ones of their texts."""
        model, texts = self.model, list(call.running)
        places = [[call.at[text][number] for number in call.running[text]] + late[text] for text in texts]
        width, device = max(map(len, places)), call.kept.device
        at = torch.tensor([each + [self.capacity] * (width - len(each)) for each in places], device=device)
        rows = torch.tensor(texts, device=device)
        here = self.tokens.each(lambda tensor: tensor[rows[:, None], at])
        inputs = model.inputs(here.ids, positions=at, n_keys=n_keys)
        inputs.first, number = here.first, torch.full_like(inputs.loop_idx, loop_idx)
        slots: Sequence[Slot] = self._slots(loop_idx)
        coda: Sequence[Slot] = self._coda()
        if len(texts) < len(self.late):
            slots, coda = ([SlotRows(slot.keys, slot.values, rows) for slot in part] for part in (slots, coda))
        state, _ = model.one_loop(here.state, here.entry, number, inputs, slots)
        self.tokens.state[rows[:, None], at] = state
        if loop_idx == self.plan.n_loops - 1:
            return
        for text in texts:
            self._leave_behind(text, late[text], loop_idx + 1)
        n_running = max(map(len, call.running.values()))
        if self.rule.reads_logits and any(late.values()):  # the coda keeps what late tokens had as they stopped
            lengths = torch.tensor([[len(call.running[text])] for text in texts], device=device)
            is_running = torch.arange(n_running, device=device) < lengths
            at = torch.where(is_running, at[:, :n_running], self.capacity)
            inputs = model.inputs(here.ids[:, :n_running], positions=at, n_keys=n_keys)
            inputs.first = here.first[:, :n_running]
        columns = torch.arange(len(self._judged(call)[0]), device=device).expand(len(texts), -1)
        hidden = self._hidden(state[:, : inputs.ids.shape[1]], inputs, coda)
        self._judge(call, loop_idx, here.state, state, columns=columns, hidden=hidden)

    def _hidden(self, state: Tensor, inputs: LayerInputs, coda: Sequence[Slot]) -> Tensor | None:
        """What the rule's logits are made of, if it reads them."""
        return self.model.leave(self.model.inject.read_out(state), inputs, coda) if self.rule.reads_logits else None

    def _judged(self, call: _Call) -> list[list[int]]:
        """Numbers of the tokens that the rule looks at, a row per running text, padded with T."""
        n_judged = 1 if self.recomputes else max(map(len, call.running.values()))
        scratch = call.kept.shape[1] - 1
        return [numbers[:n_judged] + [scratch] * (n_judged - len(numbers)) for numbers in call.running.values()]

    def _judge(
        self,
        call: _Call,
        loop_idx: int,
        before: Tensor,
        after: Tensor,
        *,
        columns: Tensor,
        hidden: Tensor | None,
    ) -> None:
        """Let tokens stop. States (R, W, D) of the running texts before and after the loop, and what is made of the
        latter; those to be judged are at `columns` (R, J)."""
        texts, numbers = list(call.running), self._judged(call)
        device, row = after.device, torch.arange(len(texts), device=after.device)[:, None]
        logits = None if hidden is None else self.model.logits(hidden[row, columns]).flatten(0, 1)
        at = torch.tensor(texts, device=device)[:, None], torch.tensor(numbers, device=device)
        kept = call.kept[at]
        fires, new = self.rule.fires(
            before[row, columns].flatten(0, 1), after[row, columns].flatten(0, 1), logits, kept.flatten(0, 1)
        )
        call.kept[at] = new.view_as(kept)
        if loop_idx == 0:  # remembered, and compared with from the next loop on
            return
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
                self.depths[text] = loop_idx + 1
            if self.recomputes:
                self._leave_behind(text, places, loop_idx + 1)
        if stopped and not self.recomputes:
            self._repeat_keys(stopped, loop_idx)

    def _leave_behind(self, text: int, places: list[int], loop_idx: int) -> None:
        if places:
            self.late[text].setdefault(loop_idx, []).extend(places)

    def _repeat_keys(self, stopped: list[tuple[int, int]], loop_idx: int) -> None:
        """What tokens (text, place) have in the slots of loop `loop_idx`, in those of all later loops too."""
        rows, places = torch.tensor(stopped, device=self.tokens.ids.device).T
        for later in range(loop_idx + 1, self.plan.n_loops):
            for old, new in zip(self._slots(loop_idx), self._slots(later), strict=True):
                new.keys[rows, :, places] = old.keys[rows, :, places]
                new.values[rows, :, places] = old.values[rows, :, places]

    def _store(self, rows: Tensor, inputs: LayerInputs, entry: Tensor, state: Tensor | None) -> None:
        """The new tokens as they stand."""
        assert inputs.first is not None
        assert inputs.positions is not None
        assert state is not None
        tokens, at = self.tokens, (rows, inputs.positions)
        tokens.ids[at], tokens.first[at], tokens.entry[at], tokens.state[at] = inputs.ids, inputs.first, entry, state
