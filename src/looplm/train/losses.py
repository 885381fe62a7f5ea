"""Losses. The label shift is done where batches are made (data.pack), so every loss takes targets as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.data.pack import IGNORE, Batch
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM


def next_token_loss(model: LoopedLM, batch: Batch, plan: LoopPlan, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the scored positions, nats, plus what the model's parts ask for (router balance, ponder
    cost). The head runs on the scored positions only."""
    losses: list[Tensor] = []
    hidden = model.hidden(batch.ids, plan=plan, documents=batch.documents, losses=losses)
    scored = batch.targets.flatten() != IGNORE
    index = torch.nonzero(scored).squeeze(1)
    logits = model.logits(hidden.flatten(0, 1).index_select(0, index))[:, : model.config.n_targets]
    targets = batch.targets.flatten().index_select(0, index)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return loss + torch.stack(losses).sum() if losses else loss
