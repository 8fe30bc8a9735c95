"""The network: feature families to event vectors, HSTU layers over each user's events, pooling, one head a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hstu_kernels import HSTU
from ubt.config import ModelConfig

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

    def forward(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return event vectors [T, hidden_size], and the weighted families side by side [T, F * id_size]."""
        embedded, weights = self._weighted(sequences)
        weighted = (embedded * weights[..., None]).flatten(1)
        fused = self.fuse(weighted) + self.skip(weighted)
        return self.dropout(fused + self.gap(_gap_bucket(sequences.timestamps, sequences.offsets))), weighted

    def weights(self, sequences: Sequences) -> Tensor:
        """Return the importance of each family [T, F]; a row sums to the number of families, or to 0 without any."""
        return self._weighted(sequences)[1]

    def _weighted(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
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
        return stack, logits.softmax(-1) * mask * len(self.families)


@dataclass
class Task:
    """What a head predicts.

    Args:
        outputs: number of logits
        family: id family whose values the logits stand for, or "" where they stand for none
        ids: the values' ids, one for each logit; empty without a family
    """

    outputs: int
    family: str = ""
    ids: list[int] = field(default_factory=list)


class TaskSpecificEncoder(nn.Module):
    """One MLP head per task on the user vector.

    A task about values of an id family, such as categories, shares the table of that family: its MLP makes a query,
    and a value's logit is the query times the value's own vector. What the encoder learns about a value from any
    event then serves its label too, however rare the label is.

    Args:
        tasks: task -> what it predicts
        encoder: encoder whose tables are shared
        width: width of the user vector
        dropout: dropout inside the heads
    """

    def __init__(self, tasks: Mapping[str, Task], encoder: EnhancedFeatureEncoder, width: int, dropout: float):
        super().__init__()
        self.tasks = dict(tasks)
        self.heads, self.bias = nn.ModuleDict(), nn.ParameterDict()
        for name, task in self.tasks.items():
            outputs = encoder.id_size if task.family else task.outputs
            self.heads[name] = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs)
            )
            self.bias[name] = nn.Parameter(torch.zeros(task.outputs))
            self.register_buffer(f"ids_{name}", torch.tensor(task.ids, dtype=torch.int64), persistent=False)

    def forward(self, users: Tensor, encoder: EnhancedFeatureEncoder) -> dict[str, Tensor]:
        """Return the logits [..., outputs] of every task for user vectors [..., width]."""
        result = {}
        for name, task in self.tasks.items():
            value = self.heads[name](users)
            if task.family:
                value = value @ encoder.embeddings[task.family](self.get_buffer(f"ids_{name}")).T
            result[name] = value + self.bias[name]
        return result


class UniversalBehavioralTransformer(nn.Module):
    """EnhancedFeatureEncoder, HSTU layers, last + mean pooling, TaskSpecificEncoder.

    Args:
        families: the feature families of the log
        tasks: task -> what its head predicts
        config: sizes
    """

    def __init__(self, families: Mapping[str, Family], tasks: Mapping[str, Task], config: ModelConfig):
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"model.hidden_size: got {config.hidden_size}, needs a multiple of num_heads {config.num_heads}"
            )
        if not 0 < config.embedding_size <= 2048:
            raise ValueError(f"model.embedding_size: got {config.embedding_size}, needs 1..2048")
        hidden, head = config.hidden_size, config.hidden_size // config.num_heads
        self.max_seq_length = config.max_seq_length
        self.encoder = EnhancedFeatureEncoder(families, hidden, config.id_size, config.dropout, config.id_dropout)
        self.hstu = HSTU(
            config.num_layers,
            hidden,
            config.num_heads,
            head,
            head,
            max_seqlen=config.max_seq_length,
            time_buckets=config.time_buckets,
            time_shift=0,
            dropout=config.dropout,
        )
        self.norm = nn.LayerNorm(hidden)
        self.clock = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        pooled = 2 * hidden + len(families) * config.id_size
        self.nobody = nn.Parameter(torch.zeros(pooled))
        self.user = nn.Sequential(
            nn.Linear(pooled + hidden, config.embedding_size), nn.LayerNorm(config.embedding_size)
        )
        self.tasks = TaskSpecificEncoder(tasks, self.encoder, config.embedding_size, config.dropout)

    def forward(self, sequences: Sequences, cutoffs: Tensor) -> Tensor:
        """Return user vectors [B, K, embedding_size], one for each moment at which a user is looked at.

        Attention is causal and looks at no later timestamp, so one pass over a user's events serves several moments:
        the vector at a moment pools the rows before it and depends on nothing after it.

        Args:
            sequences: the users' events
            cutoffs: moments, ascending, in seconds since 1970 [K]; no event is at or after the last one
        """
        x, families = self.encoder(sequences)
        rows = self.norm(self.hstu(x, sequences.offsets, self.max_seq_length, sequences.timestamps))
        pooled, clock = self._pool(rows, families, sequences, cutoffs)
        return self.user(torch.cat([pooled, self.clock(clock)], -1))

    def logits(self, users: Tensor) -> dict[str, Tensor]:
        """Return every task's logits [..., outputs] for user vectors [..., embedding_size]."""
        return self.tasks(users, self.encoder)

    def _pool(self, rows: Tensor, families: Tensor, sequences: Sequences, cutoffs: Tensor) -> tuple[Tensor, Tensor]:
        """Return last row, mean row and mean families [B, K, P] and the clock [B, K, 3].

        The clock holds the logarithms of the time since the last and the first event and of the number of events.
        The mean of the families keeps what was touched how often, which the narrower event vectors must compress.
        """
        offsets, time = sequences.offsets, sequences.timestamps
        users, moments = len(offsets) - 1, len(cutoffs)
        owner = torch.repeat_interleave(torch.arange(users, device=rows.device), offsets.diff())
        piece = owner * moments + torch.searchsorted(cutoffs, time, right=True).clamp(max=moments - 1)
        length = torch.bincount(piece, minlength=users * moments)
        together = torch.cat([rows, families], 1)
        total = (
            torch.segment_reduce(together, "sum", lengths=length, axis=0, unsafe=True)
            .unflatten(0, (users, moments))
            .cumsum(1)
        )
        count = length.unflatten(0, (users, moments)).cumsum(1)
        empty = (count == 0)[..., None]
        if not len(rows):
            pooled = self.nobody.expand(users, moments, -1)
            return pooled, torch.zeros(users, moments, 3, device=rows.device)
        first = offsets[:-1, None].clamp(max=len(rows) - 1).expand(-1, moments)
        last = (offsets[:-1, None] + count - 1).clamp(min=0, max=len(rows) - 1)
        pooled = torch.cat([rows[last], total / count.clamp(min=1)[..., None]], -1)
        ages = torch.stack([cutoffs - time[last], cutoffs - time[first], count], -1).clamp(min=0)
        clock = torch.log1p(ages.to(rows.dtype)) / torch.tensor([10.0, 10.0, 3.0], device=rows.device)
        return torch.where(empty, self.nobody, pooled), clock.masked_fill(empty, 0)


def _gap_bucket(time: Tensor, offsets: Tensor) -> Tensor:
    """Logarithmic bucket of the seconds since the user's previous event [T]; a first event has a bucket of its own."""
    if not len(time):
        return time
    gap = torch.diff(time, prepend=time[:1]).clamp(min=0)
    bucket = 1 + (torch.log1p(gap.float()) * 2).long().clamp(max=GAP_BUCKETS - 2)
    starts = offsets[:-1][offsets.diff() > 0]
    return bucket.index_fill(0, starts, 0)
