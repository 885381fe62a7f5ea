"""A task that is learnable only if position t is scored on token t + 1: repeat the first half."""

import torch

from looplm.data.pack import IGNORE, Batch


class Copying:
    """A source of it."""

    fingerprint = ""

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        half = torch.randint(3, 40, (32, 6), generator=generator)
        ids = torch.cat([half, half], dim=1)
        targets = torch.full_like(ids, IGNORE)
        targets[:, 5:-1] = ids[:, 6:]
        return Batch(ids, targets)
