"""Losses. The label shift is done where batches are made (data.pack), so every loss takes targets as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.data.pack import IGNORE, Batch
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM


def next_token_loss(model: LoopedLM, batch: Batch, plan: LoopPlan, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the scored positions, nats. The head runs on those positions only."""
    hidden = model.hidden(batch.ids, plan=plan, documents=batch.documents)
    scored = batch.targets.flatten() != IGNORE
    index = torch.nonzero(scored).squeeze(1)
    logits = model.head(hidden.flatten(0, 1).index_select(0, index)).float()
    return F.cross_entropy(logits, batch.targets.flatten().index_select(0, index), label_smoothing=label_smoothing)
