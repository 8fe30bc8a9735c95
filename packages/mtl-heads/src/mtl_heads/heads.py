"""Heads: from a representation to a task's outputs, its loss values and its predictions.

A head answers three questions: ``forward(x)`` are raw outputs (logits), ``values(outputs, targets, mask)`` is the
loss of each label (zero where absent) with the number to divide by, ``predict(outputs)`` is what a user wants to see.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .labels import whole_below
from .losses.binary import focal_denominator
from .losses.sampled import item_scores
from .masks import count_present, hide, wide_dtype
from .samplers import FrequencySampler, StreamingFrequency, UniformSampler
from .tasks import TaskSpec
from .transforms import TargetTransform


class Head(nn.Module):
    """What all heads share: hidden layers, a linear output and the choice of the loss.

    Args:
        d_in: width of the representation.
        d_out: width of the raw output.
        spec: the task.
    """

    LOSSES: tuple[str, ...] = ()

    def __init__(self, d_in: int, d_out: int, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.loss_name = spec.loss or self.LOSSES[0]
        if self.loss_name not in self.LOSSES:
            known = ", ".join(self.LOSSES)
            raise ValueError(f"loss of {spec.kind} task {spec.name!r} must be one of {known}, got {spec.loss!r}")
        self.options: dict[str, Any] = dict(spec.loss_options)
        self.layers, width = mlp(d_in, spec.hidden, spec.dropout)
        self.out = nn.Linear(width, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Raw outputs [..., d_out] of representations [..., d_in]."""
        return self.out(self.layers(x))

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of each label, zero where absent, and what their sum is divided by for the mean []."""
        raise NotImplementedError

    def predict(self, outputs: Tensor) -> Tensor:
        """Predictions in the labels' unit."""
        raise NotImplementedError

    @property
    def needs(self) -> str:
        """What a label must be, for errors."""
        return "finite numbers"

    def fits(self, targets: Tensor) -> Tensor:
        """Where labels are in range (bool, same shape)."""
        return targets.isfinite()


class BinaryHead(Head):
    """One logit [...]; also the multilabel head's parent."""

    LOSSES = ("bce", "focal")

    def __init__(self, d_in: int, spec: TaskSpec) -> None:
        super().__init__(d_in, spec.size, spec)
        self.squeeze = spec.kind == "binary"

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits[..., 0] if self.squeeze else logits

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        targets = targets.to(wide_dtype(outputs))
        if self.loss_name == "bce":
            values = losses.binary_cross_entropy(outputs, targets, mask=mask, reduction="none", **self.options)
            return values, count_present(values, mask)
        values = losses.focal_loss(outputs, targets, mask=mask, reduction="none", **self.options)
        denominator = focal_denominator(targets, mask, self.options.get("normalise", "labels"))
        return values, count_present(values, mask) if denominator is None else denominator.float()

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    @property
    def needs(self) -> str:
        return "0, 1 or a probability"

    def fits(self, targets: Tensor) -> Tensor:
        return (targets >= 0) & (targets <= 1)


class MultilabelHead(BinaryHead):
    """One logit for each of C labels [..., C]; the mask may be of rows or of single labels."""


class MulticlassHead(Head):
    """One logit for each of C classes [..., C]."""

    LOSSES = ("cross_entropy", "focal")

    def __init__(self, d_in: int, spec: TaskSpec) -> None:
        super().__init__(d_in, spec.size, spec)

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = losses.softmax_cross_entropy if self.loss_name == "cross_entropy" else losses.softmax_focal_loss
        values = loss(outputs, targets, mask=mask, reduction="none", **self.options)
        return values, count_present(values, mask)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)

    @property
    def needs(self) -> str:
        return f"whole numbers 0 .. {self.spec.size - 1}"

    def fits(self, targets: Tensor) -> Tensor:
        return whole_below(targets, self.spec.size)


class RegressionHead(Head):
    """One number [...], learned in the unit of a :class:`TargetTransform`; option ``transform``."""

    LOSSES = ("mse", "mae", "huber")

    def __init__(self, d_in: int, spec: TaskSpec, transform: str = "identity") -> None:
        super().__init__(d_in, 1, spec)
        self.transform = TargetTransform(transform)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 0]

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        targets = self.transform(targets.to(wide_dtype(outputs)))
        values = losses.regression_loss(
            outputs, targets, kind=self.loss_name, mask=mask, reduction="none", **self.options
        )
        return values, count_present(values, mask)

    def predict(self, outputs: Tensor) -> Tensor:
        return self.transform.inverse(outputs)

    @property
    def needs(self) -> str:
        return self.transform.needs

    def fits(self, targets: Tensor) -> Tensor:
        return self.transform.fits(targets)


class VectorHead(Head):
    """A vector [..., D]; one label is one vector."""

    LOSSES = ("mse", "cosine")

    def __init__(self, d_in: int, spec: TaskSpec) -> None:
        super().__init__(d_in, spec.size, spec)

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        values = losses.vector_loss(outputs, targets, kind=self.loss_name, mask=mask, reduction="none", **self.options)
        return values, count_present(values, mask)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs


class OrdinalHead(Head):
    """One score against C - 1 thresholds that rise by construction: logits of "the level is above j" [..., C - 1]."""

    LOSSES = ("ordinal",)

    def __init__(self, d_in: int, spec: TaskSpec) -> None:
        super().__init__(d_in, 1, spec)
        self.first = nn.Parameter(torch.tensor(-(spec.size - 2) / 2))
        self.steps = nn.Parameter(torch.full((spec.size - 2,), 0.5413))

    def forward(self, x: Tensor) -> Tensor:
        rises = torch.cat([self.first[None], F.softplus(self.steps)])
        return super().forward(x) - rises.cumsum(0)

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        values = losses.ordinal_loss(outputs, targets, mask=mask, reduction="none", **self.options)
        return values, count_present(values, mask)

    def predict(self, outputs: Tensor) -> Tensor:
        return losses.ordinal_probabilities(outputs)

    @property
    def needs(self) -> str:
        return f"whole numbers 0 .. {self.spec.size - 1}"

    def fits(self, targets: Tensor) -> Tensor:
        return whole_below(targets, self.spec.size)


class ZILNHead(Head):
    """Three outputs of a zero-inflated lognormal [..., 3]; predicts the expected value."""

    LOSSES = ("ziln",)

    def __init__(self, d_in: int, spec: TaskSpec) -> None:
        super().__init__(d_in, 3, spec)

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        values = losses.ziln_loss(outputs, targets, mask=mask, reduction="none", **self.options)
        return values, count_present(values, mask)

    def predict(self, outputs: Tensor) -> Tensor:
        return losses.ziln_mean(outputs)

    @property
    def needs(self) -> str:
        return "finite numbers not below 0"

    def fits(self, targets: Tensor) -> Tensor:
        return targets.isfinite() & (targets >= 0)


class RetrievalHead(Head):
    """A query vector [..., D] whose products with the item table are the scores; trained by sampled negatives.

    Args:
        table: the model's own item embedding, tied; None makes an own one of ``d_item`` columns.
        d_item: width of the item vectors when the table is own.
        num_negatives: negatives a row (``shared=False``) or a batch (``shared=True``).
        negatives: "uniform", "frequency" (needs ``counts``), "in_batch" (the batch's other positives) or "all" (the
            full softmax).
        shared: one set of negatives for the whole batch.
        counts: training count of each item [I], for "frequency".
        power: exponent of the counts.
        first: smallest item drawn as a negative.
    """

    LOSSES = ("sampled_softmax", "nce", "bpr")

    def __init__(
        self,
        d_in: int,
        spec: TaskSpec,
        table: nn.Embedding | None = None,
        d_item: int | None = None,
        num_negatives: int = 128,
        negatives: str = "uniform",
        shared: bool = True,
        counts: Tensor | None = None,
        power: float = 0.75,
        first: int = 0,
    ) -> None:
        if table is not None and table.num_embeddings != spec.size:
            raise ValueError(f"table of task {spec.name!r} must have {spec.size} rows, got {table.num_embeddings}")
        width = table.embedding_dim if table is not None else d_item or d_in
        super().__init__(d_in, width, spec)
        self.tied = table is not None
        if table is None:
            table = nn.Embedding(spec.size, width)
            nn.init.normal_(table.weight, std=width**-0.5)
        self.table = table
        self.num_negatives, self.negatives, self.shared = num_negatives, negatives, shared
        self.sampler: UniformSampler | FrequencySampler | StreamingFrequency | None = None
        if negatives == "uniform":
            self.sampler = UniformSampler(spec.size, first)
        elif negatives == "frequency":
            if counts is None or len(counts) != spec.size:
                raise ValueError(f"counts must hold {spec.size} item counts for frequency negatives of {spec.name!r}")
            self.sampler = FrequencySampler(counts, power)
        elif negatives == "in_batch":
            self.sampler = StreamingFrequency(spec.size)
        elif negatives != "all":
            raise ValueError(f'negatives must be "uniform", "frequency", "in_batch" or "all", got {negatives!r}')
        if self.loss_name != "sampled_softmax" and negatives == "all":
            raise ValueError(f'negatives="all" is the full softmax: loss must be sampled_softmax, got {self.loss_name}')

    def values(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        queries, positives = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1).long()
        flat = None if mask is None else mask.reshape(-1)
        queries, positives = hide(queries, None if flat is None else flat[:, None]), hide(positives, flat)
        weight = self.table.weight
        if self.sampler is None:
            scores = queries @ weight.to(queries.dtype).T / self.options.get("temperature", 1.0)
            values = losses.softmax_cross_entropy(scores, positives, mask=flat, reduction="none")
            return values.view(targets.shape), count_present(values, flat)
        candidates = None
        if isinstance(self.sampler, StreamingFrequency):
            if self.training:
                self.sampler.update(positives, flat)
            # The batch's other positives: neither what equals the row's own nor what stands in rows without a label.
            negatives, candidates = positives, positives[:, None] != positives
            if flat is not None:
                candidates = candidates & flat
        else:
            shape = (self.num_negatives,) if self.shared else (len(positives), self.num_negatives)
            negatives = self.sampler.sample(shape, positives.device)
        if self.loss_name == "bpr":
            positive = losses.gather_dot(queries, weight, positives[:, None])[:, 0]
            negative = item_scores(queries, weight, negatives)
            values = losses.bpr_loss(positive, negative, candidates=candidates, mask=flat, reduction="none")
            return values.view(targets.shape), count_present(values, flat)
        loss = losses.sampled_softmax_loss if self.loss_name == "sampled_softmax" else losses.nce_loss
        values = loss(
            queries,
            weight,
            positives,
            negatives,
            log_q_positives=self.sampler.log_q(positives),
            log_q_negatives=self.sampler.log_q(negatives),
            candidates=candidates,
            mask=flat,
            reduction="none",
            **self.options,
        )
        return values.view(targets.shape), count_present(values, flat)

    def scores(self, outputs: Tensor) -> Tensor:
        """Scores of every item [..., I] for query vectors [..., D]."""
        return outputs @ self.table.weight.to(outputs.dtype).T

    def predict(self, outputs: Tensor) -> Tensor:
        """The query vectors; :meth:`scores` or ``metrics.catalogue_ranks`` compare them with the catalogue."""
        return outputs

    @property
    def needs(self) -> str:
        return f"items 0 .. {self.spec.size - 1}"

    def fits(self, targets: Tensor) -> Tensor:
        return whole_below(targets, self.spec.size)


HEADS: Mapping[str, Callable[..., Head]] = {
    "binary": BinaryHead,
    "multiclass": MulticlassHead,
    "multilabel": MultilabelHead,
    "regression": RegressionHead,
    "vector": VectorHead,
    "ordinal": OrdinalHead,
    "ziln": ZILNHead,
    "retrieval": RetrievalHead,
}


def mlp(d_in: int, hidden: tuple[int, ...], dropout: float = 0.0) -> tuple[nn.Sequential, int]:
    """Linear-ReLU(-Dropout) layers of the given widths, and the width they end in."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(d_in, width), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        d_in = width
    return nn.Sequential(*layers), d_in
