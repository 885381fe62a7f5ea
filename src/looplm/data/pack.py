"""Packing short documents into rows of one length, each seeing only itself.

Attention is relative (RoPE), so a document needs no separate positions, only a mask by document number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a position that is not scored

# Tokens drawn for a batch, as a share of the tokens it holds: what almost always fits, longest documents first. Drawing
# more would fill the last gaps and drop short documents, of which the mixture would then hold too few.
FILL = 0.95


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first n_prompt are given and not scored."""

    ids: list[int]
    n_prompt: int


@dataclass
class Batch:
    """One micro-batch. `targets[b, t]` is the token that follows `ids[b, t]`, or IGNORE."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    documents: Tensor | None = None  # (B, T) int32, which document a token belongs to; None where a row is one document

    @property
    def n_tokens(self) -> int:
        """Tokens the model processes, padding included."""
        return self.ids.numel()

    @property
    def n_scored(self) -> int:
        """Tokens that the loss is a mean over. Waits for the device: ask before the batch moves to one."""
        return int((self.targets != IGNORE).sum())

    def clone(self) -> "Batch":
        """A copy of the batch."""
        return Batch(self.ids.clone(), self.targets.clone(), None if self.documents is None else self.documents.clone())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), documents)


def pack(draw: Callable[[], Document], *, n_rows: int, row_len: int, pad_id: int) -> Batch:
    """Fill n_rows rows of row_len tokens with drawn documents. The label shift happens here and only here."""
    ids = np.full((n_rows, row_len), pad_id, dtype=np.int64)
    targets = np.full((n_rows, row_len), IGNORE, dtype=np.int64)
    documents = np.zeros((n_rows, row_len), dtype=np.int32)  # 0 is padding
    used = np.zeros(n_rows, dtype=np.int64)
    drawn: list[Document] = []
    n_drawn, number = 0, 0
    while n_drawn < FILL * n_rows * row_len:
        drawn.append(draw())
        n_drawn += len(drawn[-1].ids)
    for document in sorted(drawn, key=lambda document: -len(document.ids)):
        length = len(document.ids)
        fitting = np.flatnonzero(used + length <= row_len)
        if not len(fitting):
            continue
        row = fitting[used[fitting].argmax()]  # the fullest row that has room
        start, end = used[row], used[row] + length
        number += 1
        ids[row, start:end] = document.ids
        documents[row, start:end] = number
        # position t predicts token t + 1; the first scored target is the first token after the prompt
        targets[row, start + document.n_prompt - 1 : end - 1] = document.ids[document.n_prompt :]
        used[row] = end
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(documents))
