"""How the states of the loops become one output: the last state, with or without a learned gate that says after which
loop it is good enough, or a sum weighted by halting probabilities (ACT, Graves 2016).

A position that has halted keeps running and keeps serving keys and values to the others; only its output is settled.
Once all positions have halted, the remaining loops are not run. With a cache they are run later, if a later token needs
their keys.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from looplm.config import Config, NonNegativeFloat, Number
from looplm.errors import ConfigError
from looplm.model.layer_inputs import Asides


class NoExitConfig(Config):
    """The state after the last loop."""

    kind: Literal["none"] = "none"


class ACTConfig(Config):
    """Each loop halts a position with a learned probability; the output is the states' sum weighted by it."""

    kind: Literal["act"] = "act"
    threshold: Number = Field(default=0.99, gt=0, le=1)
    """Summed probability at which a position halts."""
    renormalise: bool = True
    """Give the remaining probability to the last loop, so that the weights sum to 1 however few loops run (OpenMythos
    does not)."""
    ponder_cost: NonNegativeFloat = 0.0
    """Weight in the training loss of the mean number of loops a position takes."""


class GateConfig(Config):
    """The state after the last loop, and a learned probability of being done after each, which the exit rule `gate`
    reads at inference (Ouro, 2025). Trained by `train.exit_gate`."""

    kind: Literal["gate"] = "gate"


ExitConfig = Annotated[NoExitConfig | ACTConfig | GateConfig, Field(discriminator="kind")]


class Halting:
    """Running sums of one forward: the output (B, T, D) and, per position (B, T), the halting probability, the loops
    run, the expected number of loops, all in fp32, and whether the position has halted."""

    def __init__(self, entry: Tensor) -> None:
        self.output = torch.zeros_like(entry)
        self.total = torch.zeros(entry.shape[:2], device=entry.device)
        self.n_loops = torch.zeros_like(self.total)
        self.depth = torch.zeros_like(self.total)
        self.has_halted = torch.zeros_like(self.total, dtype=torch.bool)


class NoExit(nn.Module):
    """Keeps nothing but the newest state."""

    can_settle = False
    """Whether loops may turn out not to matter while they run."""

    def start(self, entry: Tensor) -> Halting | None:
        """What a forward keeps from loop to loop."""
        return None

    def update(self, halting: Halting | None, state: Tensor, *, is_last: bool) -> None:
        """Take in the state after one loop."""

    def is_settled(self, halting: Halting | None) -> bool:
        """Whether no later loop can change any position's output."""
        return False

    def result(self, halting: Halting | None, state: Tensor, *, asides: Asides | None) -> Tensor:
        """The output; training losses of the exit are appended to `asides`."""
        return state

    def done(self, state: Tensor) -> Tensor | None:
        """Learned probability (...) that a state (..., D) is done if it was not before; None where none is learned."""
        return None


class Gate(NoExit):
    """sigmoid(w . state / rms(state) + b); Ouro reads the state as it is, without b."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, 1)

    def done(self, state: Tensor) -> Tensor:
        # normalised, so that the gate does not read the loop off the size of a state that grows
        return self.gate(F.rms_norm(state, state.shape[-1:])).squeeze(-1).float().sigmoid()


class ACT(NoExit):
    """p = sigmoid(w . state + b) per position and loop."""

    can_settle = True

    def __init__(self, d_model: int, config: ACTConfig) -> None:
        super().__init__()
        self.config = config
        self.halt = nn.Linear(d_model, 1)

    def start(self, entry: Tensor) -> Halting:
        return Halting(entry)

    def update(self, halting: Halting | None, state: Tensor, *, is_last: bool) -> None:
        assert halting is not None
        # in fp32: whether a sum reaches a threshold near 1 hangs on its last bits
        p = self.halt(state).squeeze(-1).float().sigmoid()
        running = ~halting.has_halted
        # the loop at which a position halts takes what is left, so that the position's weights sum to 1
        halts = halting.total + p >= self.config.threshold
        weight = torch.where(halts, (1 - halting.total).clamp(min=0), p)
        # a position that never halts gives what is left to the last loop; OpenMythos drops it
        if is_last and self.config.renormalise:
            weight = (1 - halting.total).clamp(min=0)
        # a position that has halted runs on, for the keys and values that others read, and adds nothing more
        weight = weight * running
        halting.n_loops = halting.n_loops + running
        halting.output = halting.output + (weight[..., None] * state).to(state.dtype)
        # the expected loop, a sum weighted by probabilities: it has a gradient, which the count n_loops has not
        halting.depth = halting.depth + weight * halting.n_loops
        halting.total = halting.total + p * running
        halting.has_halted = halting.has_halted | (halting.total >= self.config.threshold)

    def is_settled(self, halting: Halting | None) -> bool:
        assert halting is not None
        # reads one number from the device: on a GPU a wait at every loop, which only exits that can settle pay
        return bool(halting.has_halted.all())

    def result(self, halting: Halting | None, state: Tensor, *, asides: Asides | None) -> Tensor:
        assert halting is not None
        if asides is not None and self.config.ponder_cost:
            asides.losses.append(self.config.ponder_cost * halting.depth.mean())
        return halting.output


def check_last_state(what: str, *, exit: NoExit, has_backout: bool, mend: str = "") -> None:
    """Refuse a model whose output is made of more than its last state; the message goes from `what` to `mend`.

    Raises:
        ConfigError: it has an exit over several states, or a backout.
    """
    # an exit that can settle sums over the states of several loops; a backout reads an earlier layer too
    if exit.can_settle or has_backout:
        raise ConfigError(
            f"{what} a model whose output is the last state alone: this one has "
            f"{'an exit over several states' if exit.can_settle else 'a backout'}{mend}"
        )


def make_exit(d_model: int, config: NoExitConfig | ACTConfig | GateConfig) -> NoExit:
    """The exit that `config` names."""
    if isinstance(config, GateConfig):
        return Gate(d_model)
    return ACT(d_model, config) if isinstance(config, ACTConfig) else NoExit()
