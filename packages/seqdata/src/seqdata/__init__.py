"""Event logs to memory-mapped per-user timelines and leak-proof jagged batches."""

from typing import TYPE_CHECKING, Any

from seqdata import aggregates, labels
from seqdata.append import append, compact
from seqdata.audit import audit
from seqdata.build import build
from seqdata.clock import log_bucket, time_features
from seqdata.fields import Categorical, Hashed, ItemTable, Numeric, Quantiles, Vector
from seqdata.jagged import Jagged
from seqdata.join import positions_of
from seqdata.layout import StoreError
from seqdata.negatives import Negatives
from seqdata.report import Report
from seqdata.sources import Sql
from seqdata.store import Store, open_store
from seqdata.view import Batch, View
from seqdata.vocabulary import Vocabulary

if TYPE_CHECKING:
    from seqdata.dataset import SequenceDataset, SequenceLoader

__version__ = "1.0.0"
# What changes a store reads stores, so its module stands above that of the store: the methods are put on here.
Store.append = append
Store.compact = compact
__all__ = [
    "Batch",
    "Categorical",
    "Hashed",
    "ItemTable",
    "Jagged",
    "Negatives",
    "Numeric",
    "Quantiles",
    "Report",
    "SequenceDataset",
    "SequenceLoader",
    "Sql",
    "Store",
    "StoreError",
    "Vector",
    "View",
    "Vocabulary",
    "aggregates",
    "append",
    "audit",
    "build",
    "compact",
    "labels",
    "log_bucket",
    "open_store",
    "positions_of",
    "time_features",
]


def __getattr__(name: str) -> Any:
    # torch is an extra: only these two names need it
    if name in ("SequenceDataset", "SequenceLoader"):
        try:
            from seqdata import dataset
        except ImportError as error:
            raise ImportError(f"seqdata.{name} needs torch ({error}): pip install 'seqdata[torch]'") from None
        return getattr(dataset, name)
    raise AttributeError(f"module 'seqdata' has no attribute {name!r}")
