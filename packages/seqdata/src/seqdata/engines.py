"""Who runs the steps of a build: this process, Dask workers, or whatever can map a function over numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from seqdata.job import Job
from seqdata.progress import Progress

Step = Callable[[int], dict[str, Any]]
Mapper = Callable[[Step, Sequence[int]], Iterable[dict[str, Any]]]


def run_local(job: Job, progress: bool) -> dict[str, Any]:
    """All steps of a job, one after the other; returns its schema."""
    plan = job.plan
    sizes = [part.rows for _, part in plan.parts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    bar = Progress("read", total, "rows", progress)
    parts, done = [], 0
    for number in range(len(plan.parts)):
        parts.append(job.ingest(number, bar.after(done)))
        done += parts[-1]["rows_in"]
    bar.close(done)
    _check_not_empty(parts)
    described = job.fit(parts)
    rows = sum(sum(map(sum, part["rows"])) for part in parts)
    bar = Progress("sort", rows, "events", progress)
    shards, done = [], 0
    for shard in range(plan.shards):
        shards.append(job.sort(shard, parts, described, bar.after(done)))
        done += shards[-1]["events"]
    bar.close(done)
    return job.schema(parts, described, shards)


def run_mapped(job: Job, mapper: Mapper) -> dict[str, Any]:
    """Ingests every part and sorts every shard through `mapper`; returns the job's schema.

    Ingesting deals the events of a part to shards by a hash of the user, which is the repartitioning; the shards are
    then sorted by the very function of a local build, so the bytes are the same. Parts that live in the memory of this
    process are ingested here.

    Args:
        job: what to do
        mapper: called as mapper(step, numbers), where `step` can be pickled; gives the results in the order of the
            numbers. Whoever runs a step has to see the store's folder and the input under the same names.
    """
    plan = job.plan
    here = [i for i, (_, part) in enumerate(plan.parts) if part.fingerprint() is None]
    away = [i for i in range(len(plan.parts)) if i not in here]
    remote = Job(plan.without(here), job.folder)
    read = {i: job.ingest(i) for i in here} | dict(zip(away, mapper(remote.ingest, away), strict=True))
    parts = [read[i] for i in range(len(plan.parts))]
    _check_not_empty(parts)
    described = job.fit(parts)
    shards = list(mapper(_Sort(remote, parts, described), range(plan.shards)))
    return job.schema(parts, described, shards)


def run_dask(job: Job, scheduler: str | None, progress: bool) -> dict[str, Any]:
    """`run_mapped` on Dask workers.

    Args:
        job: what to do
        scheduler: address of a scheduler; None starts a local cluster for the build
        progress: draw a progress bar

    Raises:
        ImportError: dask is not installed
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ImportError(f"engine='dask' needs dask and distributed ({error}): pip install 'seqdata[dask]'") from None

    def mapper(step: Step, numbers: Sequence[int]) -> list[dict[str, Any]]:
        label = "sort" if isinstance(step, _Sort) else "read"
        bar, results = Progress(label, len(numbers), "steps", progress), dict[int, dict[str, Any]]()
        futures = {client.submit(step, number, pure=False): number for number in numbers}
        for future, result in as_completed(futures, with_results=True):
            results[futures[future]] = result
            bar.update(len(results))
        bar.close(len(results))
        return [results[number] for number in numbers]

    with Client(scheduler) if scheduler else Client(dashboard_address=":0", threads_per_worker=1) as client:
        return run_mapped(job, mapper)


def _check_not_empty(parts: list[dict[str, Any]]) -> None:
    """Refuses a log without events."""
    read, dropped = sum(part["rows_in"] for part in parts), sum(part["dropped"] for part in parts)
    if read == dropped:
        raise ValueError(f"the log is empty: {read:,} rows read{', all dropped for a null user' if dropped else ''}")


class _Sort:
    """Sorting one shard, with what ingesting and fitting found."""

    def __init__(self, job: Job, parts: list[dict[str, Any]], described: dict[str, Any]) -> None:
        self.job, self.parts, self.described = job, parts, described

    def __call__(self, shard: int) -> dict[str, Any]:
        return self.job.sort(shard, self.parts, self.described)
