"""What optimizers remember of a parameter between steps."""

from typing import Any

import torch
from torch import Tensor


def buffer(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """A tensor of a parameter's state, zeros shaped as `like` before the first step."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    found: Tensor = state[name]
    return found
