"""How tensors of ours and of another system correspond: one table per system, read in both directions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.checkpoint import mismatches
from looplm.model.looped import LoopedLM

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some tensors of ours and the tensors of theirs with the same numbers; `load` makes ours of theirs, `dump` the
    reverse."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Change = _same
    dump: Change = _same


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule((ours,), (theirs,))


def stacked(ours: str, theirs: Sequence[str], *, transposed: bool = False) -> Rule:
    """One tensor of ours holds several of theirs along a new first axis."""
    return Rule(
        (ours,),
        tuple(theirs),
        lambda parts: [torch.stack([part.mT if transposed else part for part in parts])],
        lambda parts: [part.mT.contiguous() if transposed else part.clone() for part in parts[0]],
    )


def split(ours: Sequence[str], theirs: str) -> Rule:
    """Several tensors of ours are the entries of one of theirs."""
    return Rule(
        tuple(ours),
        (theirs,),
        lambda parts: [part.clone() for part in parts[0].split(1)],
        lambda parts: [torch.cat(list(parts))],
    )


def scalar(ours: str, theirs: str) -> Rule:
    """A tensor of one entry, which is 0-d in theirs."""
    return Rule((ours,), (theirs,), lambda parts: [parts[0].reshape(1)], lambda parts: [parts[0].reshape(())])


def halves_swapped(ours: str, theirs: str, *, head_dim: int) -> Rule:
    """A projection whose heads have their two halves swapped, which turns a rotation by -angle into one by angle under
    half-split RoPE."""

    def swap(parts: Sequence[Tensor]) -> Sequence[Tensor]:
        weight = parts[0]
        halves = weight.unflatten(0, (-1, 2, head_dim // 2))
        return [halves.flip(1).reshape(weight.shape)]

    return Rule((ours,), (theirs,), swap, swap)


def misfits(model: LoopedLM, rules: Iterable[Rule], state: Mapping[str, Tensor]) -> str:
    """Missing, extra and misshapen keys of a foreign state dict in one line, empty where it fits. The model may be on
    the meta device."""
    problems = mismatches(_their_shapes(model, list(rules)), state)
    return "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")


def load_by_rules(model: LoopedLM, rules: Iterable[Rule], state: Mapping[str, Tensor]) -> None:
    """Copy a foreign state dict that fits (`misfits`) into `model`."""
    own = _own_tensors(model)
    with torch.no_grad():
        for rule in rules:
            parts = rule.load([state[name].float() for name in rule.theirs])  # float8 is not stacked
            for name, part in zip(rule.ours, parts, strict=True):
                own[name].copy_(part)


def dump_by_rules(model: LoopedLM, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The weights of `model` under the other system's names."""
    own = _own_tensors(model)
    state: dict[str, Tensor] = {}
    for rule in rules:
        parts = rule.dump([own[name].detach() for name in rule.ours])
        state |= {name: part.contiguous() for name, part in zip(rule.theirs, parts, strict=True)}
    return state


def _their_shapes(model: LoopedLM, rules: Sequence[Rule]) -> dict[str, torch.Size]:
    own = _own_tensors(model)
    named = {name for rule in rules for name in rule.ours}
    assert named == set(own), f"the table leaves out or invents {sorted(named ^ set(own))}"
    shapes: dict[str, torch.Size] = {}
    for rule in rules:
        parts = rule.dump([torch.empty(own[name].shape, device="meta") for name in rule.ours])
        shapes |= {name: part.shape for name, part in zip(rule.theirs, parts, strict=True)}
    return shapes


def _own_tensors(model: LoopedLM) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    state = dict(model.named_parameters())  # leaves out the second name of a tied one
    return state | dict(model.named_buffers())
