"""Held-out loss: how surprised a model is by text that it was not trained on.

The loss is in nats a token, over every target that counts (not padding, not across a
document's end); perplexity is its exponential. Tokens of one document err together, so the
standard error takes a document, not a token, as one draw; a sequence that holds parts of several
documents belongs to the one at its middle:

    loss = sum_i s_i / sum_i n_i,    error^2 = N/(N-1) * sum_i (s_i - loss n_i)^2 / (sum_i n_i)^2

with s_i nats over n_i tokens in document i of N, the usual one for a ratio of two sums. Two
models are compared sequence by sequence, with s_i their difference: what makes a text hard
for both cancels, so a small difference shows on little text.

Shapes.  B sequences    S positions    D model width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moesaic.console import track
from moesaic.data.tokenfolder import IGNORED, TokenFolder
from moesaic.errors import DataError
from moesaic.model.loss import linear_cross_entropy
from moesaic.model.transformer import Transformer


@dataclass(frozen=True)
class SequenceLoss:
    """What one sequence contributed."""

    source: str
    document: int
    """The document at its middle, counted within the source."""
    nats: float
    """Sum over the targets that count."""
    tokens: int


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss over a set of sequences, kept apart so that models can be compared pairwise."""

    sequences: tuple[SequenceLoss, ...]

    @property
    def tokens(self) -> int:
        """Targets that counted."""
        return sum(sequence.tokens for sequence in self.sequences)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return math.fsum(sequence.nats for sequence in self.sequences) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that exceeds any float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def standard_error(self) -> float | None:
        """Of the loss, over documents; None when there is only one."""
        return _standard_error(self.sequences)

    @property
    def sources(self) -> dict[str, HeldoutLoss]:
        """The same, source by source."""
        names = dict.fromkeys(item.source for item in self.sequences)
        return {
            name: HeldoutLoss(tuple(item for item in self.sequences if item.source == name))
            for name in names
        }

    def minus(self, other: HeldoutLoss) -> tuple[float, float | None]:
        """This loss less another over the same sequences, and the difference's standard error."""
        pairs = [
            replace(mine, nats=mine.nats - its.nats)
            for mine, its in zip(self.sequences, other.sequences, strict=True)
        ]
        return HeldoutLoss(tuple(pairs)).loss, _standard_error(pairs)


def _standard_error(sequences: Sequence[SequenceLoss]) -> float | None:
    sums: dict[tuple[str, int], tuple[float, int]] = {}
    for item in sequences:
        nats, tokens = sums.get((item.source, item.document), (0.0, 0))
        sums[item.source, item.document] = nats + item.nats, tokens + item.tokens
    if len(sums) < 2:
        return None
    total = sum(tokens for _, tokens in sums.values())
    mean = math.fsum(nats for nats, _ in sums.values()) / total
    squares = math.fsum((nats - mean * tokens) ** 2 for nats, tokens in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / total


@torch.no_grad()
def heldout_loss(
    model: Transformer,
    folder: TokenFolder,
    *,
    split: str = "heldout",
    max_sequences: int | None = None,
    batch_size: int = 4,
    label: str = "evaluating",
) -> HeldoutLoss:
    """Loss of `model` over one split of a token folder, dropless and without any regulariser.

    Args:
        model: Any model; its train or eval mode makes no difference.
        folder: Tokens of the model's own tokenizer.
        split: `heldout` or `train`.
        max_sequences: Sequences to read, spread evenly over the split; None reads all.
        batch_size: Sequences a forward pass.
        label: What the progress bar says.

    Raises:
        DataError: If the split is empty, or has tokens that the model does not know.
    """
    if folder.vocab_size > model.spec.vocab_size:
        raise DataError(
            f"{folder.path} has a vocabulary of {folder.vocab_size:,}, but the model knows "
            f"{model.spec.vocab_size:,} tokens. Prepare the text with the model's own tokenizer."
        )
    rows = _chosen_rows(folder, split, max_sequences)
    device = model.head_weight.device
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses: list[SequenceLoss] = []
    for batch in track(batches, label=label):
        read = [folder.row(split, source, row) for source, row in batch]
        inputs_BS, targets_BS, documents_BS = (
            torch.stack([torch.as_tensor(item[part]) for item in read]).to(device, torch.int64)
            for part in range(3)
        )
        hidden_BSD, _ = model.hidden(inputs_BS, documents_BS=documents_BS)
        for (source, row), hidden_SD, target_S in zip(batch, hidden_BSD, targets_BS, strict=True):
            nats = linear_cross_entropy(hidden_SD, model.head_weight, target_S)
            losses.append(
                SequenceLoss(
                    source=source,
                    document=folder.document_of(split, source, row),
                    nats=float(nats),
                    tokens=int((target_S != IGNORED).sum()),
                )
            )
    result = HeldoutLoss(tuple(losses))
    if not result.tokens:
        raise DataError(f"The {split} split of {folder.path} has no token that counts as a target.")
    return result


def _chosen_rows(folder: TokenFolder, split: str, most: int | None) -> list[tuple[str, int]]:
    rows = [
        (source, row)
        for source in folder.sources
        for row in range(folder.num_sequences(split, source))
    ]
    if not rows:
        raise DataError(f"The {split} split of {folder.path} is empty. Prepare it with more text.")
    count = min(len(rows), most or len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
