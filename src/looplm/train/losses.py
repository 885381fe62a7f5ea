"""Losses. The label shift is done where batches are made (data.pack), so every loss takes targets as they are."""

import torch
from torch import Tensor

from looplm.data.pack import IGNORE, Batch
from looplm.errors import DataError
from looplm.model.layer_inputs import Asides
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM


def next_token_loss(
    model: LoopedLM,
    batch: Batch,
    plan: LoopPlan,
    *,
    label_smoothing: float = 0.0,
    loads: list[tuple[int, Tensor]] | None = None,
) -> Tensor:
    """Mean cross-entropy over the scored positions, nats, plus what the model's parts ask for (router balance, ponder
    cost). The head runs on the scored positions only. The routers' loads are appended to `loads`."""
    asides = Asides()
    hidden = model.hidden(batch.ids, plan=plan, documents=batch.documents, asides=asides)
    if loads is not None:
        loads.extend(asides.loads)
    rows, targets = hidden.flatten(0, 1), batch.targets.flatten()
    scored = targets != IGNORE
    if not scored.all():
        index = torch.nonzero(scored).squeeze(1)
        if not len(index):
            raise DataError("no position of this batch is scored, so there is nothing to learn from it: longer rows?")
        rows, targets = rows.index_select(0, index), targets.index_select(0, index)
    loss = model.cross_entropy(rows, targets, label_smoothing=label_smoothing)
    return loss + torch.stack(asides.losses).sum() if asides.losses else loss
