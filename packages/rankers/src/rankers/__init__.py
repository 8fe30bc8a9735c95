"""Candidate generators, baselines and a LightGBM re-ranker under one contract, with a full-catalogue evaluation."""

from .baskets import TIFUKNN, UPCF, TopFreq
from .evaluate import Evaluation, evaluate
from .factors import IALS, LogisticMF
from .interactions import Interactions
from .linear import EASE, ItemKNN
from .popularity import Popularity, RepeatItems
from .ranker import Ranker, top_items
from .rerank import LambdaRank
from .union import Candidates, union

__all__ = [
    "EASE",
    "IALS",
    "TIFUKNN",
    "UPCF",
    "Candidates",
    "Evaluation",
    "Interactions",
    "ItemKNN",
    "LambdaRank",
    "LogisticMF",
    "Popularity",
    "Ranker",
    "RepeatItems",
    "TopFreq",
    "evaluate",
    "top_items",
    "union",
]
