"""The network: what an item is, what a history says, and how well items fit it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels import HSTU
from purchase.config import EVENTS, Model

GAPS, HOURS = 32, 24


class Recommender(nn.Module):
    """Histories to vectors, scored against the vectors of all items, which are the same as those of the histories.

    An item's vector is the sum of its own, its brand's and its category's. One that the network never learnt from has
    none of its own, so cold items stand where their brand and category are.

    Args:
        settings: sizes
        brand: code of each item [I]
        category: code of each item [I]
        learnt: whether the item has an event to learn from [I], bool
        objectives: events with a head of their own
    """

    brand: Tensor
    category: Tensor
    learnt: Tensor

    def __init__(
        self, settings: Model, brand: Tensor, category: Tensor, learnt: Tensor, objectives: Sequence[str]
    ) -> None:
        super().__init__()
        width = settings.width
        self.id_dropout, self.width = settings.id_dropout, width
        self.register_buffer("brand", brand)
        self.register_buffer("category", category)
        self.register_buffer("learnt", learnt)
        # Padding: without a brand or category nothing is added.
        self.items = nn.Embedding(len(brand), width)
        self.brands = nn.Embedding(int(brand.max()) + 1, width, padding_idx=0)
        self.categories = nn.Embedding(int(category.max()) + 1, width, padding_idx=0)
        self.events = nn.Embedding(len(EVENTS), width)
        self.gaps = nn.Embedding(GAPS, width)
        self.hours = nn.Embedding(HOURS, width)
        self.encoder: nn.Module
        if settings.encoder == "hstu":
            size = width // settings.heads
            self.encoder = _Hstu(settings, size)
        else:
            self.encoder = _Transformer(settings)
        self.heads = nn.ModuleDict({name: nn.Linear(width, width) for name in objectives})
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=width**-0.5)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])

    def item_vectors(self) -> Tensor:
        """The vectors of all items [I, D]."""
        side = self.brands(self.brand) + self.categories(self.category)
        return side + self.items.weight * self.learnt[:, None]

    def forward(self, item: Tensor, event: Tensor, seconds: Tensor, offsets: Tensor) -> Tensor:
        """What is known after each event.

        Args:
            item: item of each event [T]
            event: place of its type in `EVENTS` [T]
            seconds: its time [T], int64
            offsets: borders of the users [B + 1]

        Returns:
            Vectors [T, D].
        """
        own = self.items(item) * self.learnt[item][:, None]
        if self.training and self.id_dropout:
            own = own * (torch.rand(len(item), 1, device=item.device) >= self.id_dropout)
        x = own + self.brands(self.brand[item]) + self.categories(self.category[item])
        x = x + self.events(event) + self.gaps(_gap_bucket(seconds, offsets)) + self.hours(seconds % 86_400 // 3600)
        return self.encoder(x, offsets, seconds)

    def queries(self, hidden: Tensor, objective: str) -> Tensor:
        """What an item is multiplied with to score it for an objective [N, D]."""
        return self.heads[objective](hidden)


class _Transformer(nn.Module):
    """Causal pre-norm transformer on right-padded sequences: what is padded lies behind all that counts."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.position = nn.Embedding(settings.max_len, settings.width)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, x: Tensor, offsets: Tensor, seconds: Tensor) -> Tensor:
        lengths = offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        place = torch.arange(len(x), device=x.device) - offsets[row]
        padded = x.new_zeros(len(lengths), int(lengths.max()), x.shape[1])
        padded = padded.index_put((row, place), x + self.position(place))
        for layer in self.layers:
            padded = layer(padded)
        return self.norm(padded[row, place])


class _Layer(nn.Module):
    def __init__(self, settings: Model) -> None:
        super().__init__()
        width = settings.width
        self.num_heads, self.dropout = settings.heads, settings.dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(attention), self.dropout, self.training)
        return x + F.dropout(self.feed(self.feed_norm(x)), self.dropout, self.training)


class _Hstu(nn.Module):
    def __init__(self, settings: Model, size: int) -> None:
        super().__init__()
        self.layers = HSTU(
            settings.layers,
            settings.width,
            settings.heads,
            size,
            size,
            max_seqlen=settings.max_len,
            dropout=settings.dropout,
        )
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, x: Tensor, offsets: Tensor, seconds: Tensor) -> Tensor:
        return self.norm(self.layers(x, offsets, timestamps=seconds))


def _gap_bucket(seconds: Tensor, offsets: Tensor) -> Tensor:
    """log2 of the seconds since the user's event before, 0 for the first."""
    gaps = seconds.diff(prepend=seconds[:1]).clamp_min(0)
    gaps[offsets[:-1][offsets.diff() > 0]] = 0
    return torch.log2(gaps.double() + 1).long().clamp_max(GAPS - 1)
