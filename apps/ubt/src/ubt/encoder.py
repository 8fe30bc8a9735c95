"""Events as the network reads them, and the encoder that makes a vector of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAP_BUCKETS = 40
# Families with so many ids that most of them are rare.
RARE_FAMILIES = ("item", "url")


@dataclass
class Sequences:
    """The events of some users, packed: user b owns rows offsets[b] to offsets[b + 1].

    Args:
        features: family -> ids int64 [T], or vectors float32 [T, width] that are zero where missing
        timestamps: seconds since 1970, int64 [T], not decreasing within a user
        offsets: int64 [B + 1]
    """

    features: dict[str, Tensor]
    timestamps: Tensor
    offsets: Tensor


@dataclass
class Family:
    """One feature family.

    Args:
        kind: "id" for a table of vectors, "vector" for numbers that are given
        size: number of ids, 0 = missing included, or width of the given vectors
    """

    kind: str
    size: int


class EnhancedFeatureEncoder(nn.Module):
    """Embed every feature family of an event, weigh the families against each other, and fuse them with an MLP.

    The weights are a softmax over the families that the event has; a missing one weighs exactly nothing. The time
    since the user's previous event enters as one more learned vector.

    Args:
        families: family name -> its kind and size; any subset of the known ones
        hidden_size: width of the event vectors
        id_size: width of each family's own embedding
        dropout: dropout on the fused vector
        id_dropout: share of the items and URLs that training replaces by "unknown"; whoever is known by rare ids alone
            could be learned by heart otherwise
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        hidden_size: int,
        id_size: int,
        dropout: float = 0.0,
        id_dropout: float = 0.0,
    ):
        super().__init__()
        self.families, self.id_size, self.id_dropout = dict(families), id_size, id_dropout
        self.embeddings = nn.ModuleDict()
        for name, family in self.families.items():
            if family.kind == "id":
                table = nn.Embedding(family.size, id_size, padding_idx=0)
                nn.init.normal_(table.weight, std=0.05)
                with torch.no_grad():
                    table.weight[0] = 0
                self.embeddings[name] = table
            else:
                self.embeddings[name] = nn.Sequential(
                    nn.Linear(family.size, id_size), nn.GELU(), nn.Linear(id_size, id_size)
                )
        width = len(self.families) * id_size
        self.importance = nn.Linear(width, len(self.families))
        self.fuse = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.skip = nn.Linear(width, hidden_size, bias=False)
        self.gap = nn.Embedding(GAP_BUCKETS, hidden_size)
        nn.init.normal_(self.gap.weight, std=0.05)
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequences: Sequences, previous: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return event vectors [T, hidden_size], the weighted families [T, F, id_size] and their presence [T, F].

        Args:
            sequences: the users' events
            previous: time of each user's event before these, 0 = none; None = none at all [B]
        """
        embedded, weights, present = self._weighted(sequences)
        weighted = embedded * weights[..., None]
        flat = weighted.flatten(1)
        gap = self.gap(_gap_bucket(sequences.timestamps, sequences.offsets, previous))
        return self.dropout(self.fuse(flat) + self.skip(flat) + gap), weighted, present

    def weights(self, sequences: Sequences) -> Tensor:
        """Return the importance of each family [T, F]; a row sums to the number of families, or to 0 without any."""
        return self._weighted(sequences)[1]

    def _weighted(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        embedded, present = [], []
        for name, family in self.families.items():
            value = sequences.features[name]
            if self.training and name in RARE_FAMILIES:
                hidden = torch.rand(value.shape, device=value.device) < self.id_dropout
                value = torch.where(hidden & (value > 0), 1, value)
            there = value > 0 if family.kind == "id" else (value != 0).any(-1)
            embedded.append(self.embeddings[name](value) * there[:, None])
            present.append(there)
        stack, mask = torch.stack(embedded, 1), torch.stack(present, 1)
        logits = self.importance(stack.flatten(1)).masked_fill(~mask, -1e4)
        return stack, logits.softmax(-1) * mask * len(self.families), mask


def no_events(families: Mapping[str, Family], users: int) -> Sequences:
    """Return the sequences of users without events."""
    features = {
        name: torch.zeros(0, dtype=torch.int64) if family.kind == "id" else torch.zeros(0, family.size)
        for name, family in families.items()
    }
    return Sequences(features, torch.zeros(0, dtype=torch.int64), torch.zeros(users + 1, dtype=torch.int64))


def _gap_bucket(time: Tensor, offsets: Tensor, previous: Tensor | None) -> Tensor:
    """Logarithmic bucket of the seconds since the user's previous event [T]; a first event has a bucket of its own."""
    if not len(time):
        return time
    lengths = offsets.diff()
    starts = offsets[:-1][lengths > 0]
    before = torch.roll(time, 1)
    before[starts] = 0 if previous is None else previous[lengths > 0]
    gap = (time - before).clamp(min=0)
    bucket = 1 + (torch.log1p(gap.float()) * 2).long().clamp(max=GAP_BUCKETS - 2)
    return torch.where(before == 0, 0, bucket)
