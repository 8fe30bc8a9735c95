"""The network: event vectors, HSTU layers over each user's events, pooling, one head a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hstu_kernels import HSTU, RaggedKVCache
from mtl_heads import MultiTaskHeads, TaskSpec
from ubt.config import ModelConfig
from ubt.encoder import EnhancedFeatureEncoder, Family, Sequences, no_events

DAY = 86400


@dataclass
class Summary:
    """What the network keeps of users' events at K moments; of the last moment, it can be carried on to later events.

    Args:
        last: row of the newest event [B, K, hidden]
        total: sums over the events of rows and families [B, K, hidden + F * id]
        faded: sums of the families and of their presence, weighed by age, for every half-life [B, K, L, F, id + 1]
        count: number of events [B, K]
        first, newest: seconds since 1970 of the first and the newest event, 0 without events [B, K]
    """

    last: Tensor
    total: Tensor
    faded: Tensor
    count: Tensor
    first: Tensor
    newest: Tensor

    def select(self, users: Tensor) -> Summary:
        """Return the same of these users [b] only, in this order."""
        return Summary(*(getattr(self, one.name)[users] for one in fields(self)))


@dataclass
class State:
    """All that is needed to go on when new events of some users arrive.

    Args:
        moment: seconds since 1970 that the summary is for
        summary: of these users, K = 1
        cache: keys and values of their events
    """

    moment: int
    summary: Summary
    cache: RaggedKVCache

    def select(self, users: Tensor) -> State:
        """Return the same of these users [b] only, in this order; the cache is changed in place."""
        self.cache.select(users)
        return State(self.moment, self.summary.select(users), self.cache)


class TaskSpecificEncoder(nn.Module):
    """One MLP head per task on the user vector.

    A task about values of an id family, such as categories or skus, shares the table of that family: its MLP makes a
    query, and a value's logit is the query times the value's own vector. What the encoder learns about a value from
    any event then serves its label too, however rare the label is.

    Args:
        tasks: kind, loss and size of every task
        values: task -> family and the ids in it that its logits stand for
        encoder: encoder whose tables are shared
        width: width of the user vector
    """

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        values: Mapping[str, tuple[str, Sequence[int]]],
        encoder: EnhancedFeatureEncoder,
        width: int,
    ):
        super().__init__()
        tables: dict[str, Any] = {task: encoder.embeddings[family] for task, (family, _) in values.items()}
        catalogues = {task.name: tables[task.name] for task in tasks if task.kind == "retrieval"}
        self.heads = MultiTaskHeads(width, tasks, catalogues)
        self.ids = {task: torch.tensor(ids, dtype=torch.int64) for task, (_, ids) in values.items()}
        for task in tasks:
            if task.name in values and task.kind == "multilabel":
                head: Any = self.heads.head(task.name)
                head.out = _SharedTable(width, tables[task.name], self.ids[task.name])

    def forward(self, users: Tensor) -> dict[str, Tensor]:
        """Return every task's predictions before the sigmoid [..., outputs] for user vectors [..., width]."""
        outputs = self.heads(users)
        for task, spec in self.heads.tasks.items():
            if spec.kind == "retrieval":
                head: Any = self.heads.head(task)
                outputs[task] = outputs[task] @ head.table(self.ids[task].to(users.device)).T
            elif spec.kind in ("binary", "regression"):
                outputs[task] = outputs[task][..., None]
        return outputs


class _SharedTable(nn.Module):
    """Logits of some values of a table: a query from the input, times each value's vector."""

    ids: Tensor

    def __init__(self, width: int, table: nn.Embedding, ids: Tensor):
        super().__init__()
        self.query, self.table = nn.Linear(width, table.embedding_dim), table
        self.bias = nn.Parameter(torch.zeros(len(ids)))
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.table(self.ids).T + self.bias


class UniversalBehavioralTransformer(nn.Module):
    """EnhancedFeatureEncoder, HSTU layers, last + mean pooling, TaskSpecificEncoder.

    Args:
        families: the feature families of the log
        tasks: what the heads predict
        values: task -> family and ids that its logits stand for
        config: sizes
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        tasks: Sequence[TaskSpec],
        values: Mapping[str, tuple[str, Sequence[int]]],
        config: ModelConfig,
    ):
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"model.hidden_size: got {config.hidden_size}, needs a multiple of num_heads {config.num_heads}"
            )
        if not 0 < config.embedding_size <= 2048:
            raise ValueError(f"model.embedding_size: got {config.embedding_size}, needs 1..2048")
        if any(days <= 0 for days in config.half_lives_days):
            raise ValueError(f"model.half_lives_days: got {config.half_lives_days}, needs numbers > 0")
        hidden, head = config.hidden_size, config.hidden_size // config.num_heads
        self.max_seq_length, self.half_lives = config.max_seq_length, [DAY * days for days in config.half_lives_days]
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
        wide = len(families) * config.id_size
        pooled = 2 * hidden + wide + len(self.half_lives) * (wide + len(families))
        self.nobody = nn.Parameter(torch.zeros(pooled))
        self.user = nn.Sequential(
            nn.Linear(pooled + hidden, config.embedding_size), nn.LayerNorm(config.embedding_size)
        )
        self.tasks = TaskSpecificEncoder(tasks, values, self.encoder, config.embedding_size)

    def forward(self, sequences: Sequences, cutoffs: Tensor) -> Tensor:
        """Return user vectors [B, K, embedding_size], one for each moment at which a user is looked at.

        Attention is causal and looks at no later timestamp, so one pass over a user's events serves several moments:
        the vector at a moment pools the rows before it and depends on nothing after it.

        Args:
            sequences: the users' events
            cutoffs: moments, ascending, in seconds since 1970 [K]; no event is at or after the last one
        """
        x, families, present = self.encoder(sequences)
        rows = self.norm(self.hstu(x, sequences.offsets, self.max_seq_length, sequences.timestamps))
        summary = self._summarise(rows, families, present, sequences, cutoffs, None)
        return self._vectors(summary, cutoffs)

    def start(self, users: int, moment: int) -> State:
        """Return the state of users who have no event yet."""
        nothing = no_events(self.encoder.families, users)
        x, families, present = self.encoder(nothing)
        summary = self._summarise(self.norm(x), families, present, nothing, torch.tensor([moment]), None)
        return State(moment, summary, RaggedKVCache(users))

    def advance(self, state: State, events: Sequences, moment: int) -> tuple[Tensor, State]:
        """Return user vectors [B, embedding_size] at a later moment, and the state then; only new events are attended.

        Args:
            state: what is known of the users
            events: their new events, none of them before the ones that the state holds; at most max_seq_length with
                those
            moment: seconds since 1970, not before the state's
        """
        x, families, present = self.encoder(events, state.summary.newest[:, 0])
        rows = self.norm(self.hstu(x, events.offsets, self.max_seq_length, events.timestamps, state.cache))
        cutoffs = torch.tensor([moment])
        summary = self._summarise(rows, families, present, events, cutoffs, state)
        return self._vectors(summary, cutoffs)[:, 0], State(moment, summary, state.cache)

    def logits(self, users: Tensor) -> dict[str, Tensor]:
        """Return every task's predictions [..., outputs] for user vectors [..., embedding_size]."""
        return self.tasks(users)

    def _summarise(
        self,
        rows: Tensor,
        families: Tensor,
        present: Tensor,
        sequences: Sequences,
        cutoffs: Tensor,
        before: State | None,
    ) -> Summary:
        offsets, time = sequences.offsets, sequences.timestamps
        users, moments = len(offsets) - 1, len(cutoffs)
        owner = torch.repeat_interleave(torch.arange(users, device=rows.device), offsets.diff())
        at = torch.searchsorted(cutoffs, time, right=True).clamp(max=moments - 1)
        length = torch.bincount(owner * moments + at, minlength=users * moments)

        def sums(values: Tensor) -> Tensor:
            total = torch.segment_reduce(values.float(), "sum", lengths=length, axis=0, unsafe=True)
            return total.unflatten(0, (users, moments))

        new = length.unflatten(0, (users, moments)).cumsum(1)
        total = sums(torch.cat([rows, families.flatten(1)], 1)).cumsum(1)
        faded = rows.new_zeros(users, moments, 0, families.shape[1], families.shape[2] + 1)
        if self.half_lives:
            faded = self._fade(sums, families, present, (cutoffs[at] - time).clamp(min=0), cutoffs, before)
        # One more row, so that users without events have something to point at.
        rows, time = nn.functional.pad(rows.float(), (0, 0, 0, 1)), nn.functional.pad(time, (0, 1))
        newest = torch.where(new > 0, offsets[:-1, None] + new - 1, len(time) - 1)
        first = torch.where(new > 0, offsets[:-1, None], len(time) - 1)
        summary = Summary(rows[newest], total, faded, new, time[first], time[newest])
        if before is None:
            return summary
        past = before.summary
        return replace(
            summary,
            last=torch.where((new > 0)[..., None], summary.last, past.last),
            total=total + past.total,
            count=new + past.count,
            first=torch.where(past.count > 0, past.first, summary.first),
            newest=torch.where(new > 0, summary.newest, past.newest),
        )

    def _fade(
        self,
        sums: Callable[[Tensor], Tensor],
        families: Tensor,
        present: Tensor,
        age: Tensor,
        cutoffs: Tensor,
        before: State | None,
    ) -> Tensor:
        """Sums over all events up to each moment, each halved once per half-life [B, K, L, F, id + 1]."""
        values = torch.cat([families, present[..., None].to(families)], -1)
        result: list[Tensor] = []
        for half_life in self.half_lives:
            weight = torch.exp2(-age.to(torch.float32) / half_life)
            pieces = sums((values * weight[:, None, None]).flatten(1)).unflatten(-1, values.shape[1:])
            previous = torch.zeros_like(pieces[:, 0])
            moment = int(cutoffs[0])
            if before is not None:
                previous, moment = before.summary.faded[:, 0, len(result)], before.moment
            moments = []
            for k, cutoff in enumerate(cutoffs.tolist()):
                previous = previous * 2.0 ** ((moment - cutoff) / half_life) + pieces[:, k]
                moment = cutoff
                moments.append(previous)
            result.append(torch.stack(moments, 1))
        return torch.stack(result, 2)

    def _vectors(self, summary: Summary, cutoffs: Tensor) -> Tensor:
        """Return the user vectors: last row, mean row, mean families, recent families, and the clock.

        The clock holds the logarithms of the time since the last and the first event and of the number of events.
        The means of the families keep what was touched how often, which the narrower event vectors must compress: over
        all events, and over the recent ones that have the family at all, whose number stands beside it.
        """
        count = summary.count
        amount = summary.faded[..., -1:]
        recent = torch.cat([summary.faded[..., :-1] / (amount + 0.3), torch.log1p(amount)], -1)
        pooled = torch.cat([summary.last, summary.total / count.clamp(min=1)[..., None], recent.flatten(2)], -1)
        ages = torch.stack([cutoffs - summary.newest, cutoffs - summary.first, count], -1).clamp(min=0)
        clock = torch.log1p(ages.to(pooled.dtype)) / torch.tensor([10.0, 10.0, 3.0], device=pooled.device)
        empty = (count == 0)[..., None]
        pooled = torch.where(empty, self.nobody, pooled)
        return self.user(torch.cat([pooled, self.clock(clock.masked_fill(empty, 0))], -1))
