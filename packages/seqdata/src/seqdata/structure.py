"""Whether what a store holds can be true, where its checksums are gone or do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from seqdata.layout import StoreError
from seqdata.store import Store

CHUNK = 1 << 20


def faults(store: Store) -> Iterator[str]:
    """Yields a sentence for each array of a store that breaks its rules, naming the file or the field."""
    home = store.home
    if (np.diff(store.offsets) < 1).any():
        yield f"{home}/offsets.npy does not rise from user to user"
        return
    if (store.users[1:] <= store.users[:-1]).any():
        yield f"{home}/users does not rise from user to user"
    same = np.ones(store.num_events, bool)
    same[store.offsets[:-1]] = False
    if (same[1:] & (store.time[1:] < store.time[:-1])).any():
        yield f"{home}/time.npy is not in order within a user"
    if store.order is not None and not np.array_equal(np.sort(store.order), np.arange(store.num_events)):
        yield f"{home}/order.npy does not name every event once"
        return
    for name in [*store.fields, *store.item_columns]:
        if store.entry(name)["kind"] == "categorical":
            try:
                store.vocabulary(name)
            except StoreError as error:
                yield str(error)
    for name, entry in store.schema["fields"].items():
        if entry["kind"] == "numeric":
            continue
        for low in range(0, store.num_events, CHUNK):
            ids = store.take(name, np.arange(low, min(low + CHUNK, store.num_events)))
            if ids.min() < 0 or ids.max() >= entry["size"]:
                needs = f"needs 0..{entry['size'] - 1}"
                yield f"{entry['file']}.npy: field {name!r} has ids {ids.min()}..{ids.max()}; {needs}"
                break
