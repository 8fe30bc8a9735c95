"""The steps of a build on the workers of a Dask cluster."""

from __future__ import annotations

from typing import Any

from seqdata.build import check_not_empty
from seqdata.job import Job
from seqdata.progress import Progress


def run_dask(job: Job, scheduler: str | None, progress: bool) -> dict[str, Any]:
    """Ingests every part and sorts every shard on Dask workers; returns the job's schema.

    Ingesting deals the events of a part to shards by a hash of the user, which is the repartitioning; the shards are
    then sorted by the very function of a local build. Parts that live in the memory of this process are ingested here.
    scheduler: address of a scheduler whose workers see the store's folder and the input under the same names; None
        starts a local cluster for the build.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ImportError(f"engine='dask' needs dask and distributed ({error}): pip install 'seqdata[dask]'") from None
    plan = job.plan

    def everywhere(
        label: str, unit: str, step: Any, numbers: list[int], key: str, *rest: Any
    ) -> dict[int, dict[str, Any]]:
        bar, done, results = Progress(label, None, unit, progress), 0, dict[int, dict[str, Any]]()
        futures = {client.submit(step, number, *rest, pure=False): number for number in numbers}
        for future, result in as_completed(futures, with_results=True):
            results[futures[future]] = result
            done += result[key]
            bar.update(done)
        bar.close(done)
        return results

    with Client(scheduler) if scheduler else Client(dashboard_address=":0", threads_per_worker=1) as client:
        here = [i for i, (_, part) in enumerate(plan.parts) if part.fingerprint() is None]
        local = {i: job.ingest(i) for i in here}
        remote = Job(plan.without(here), job.folder)
        away = [i for i in range(len(plan.parts)) if i not in local]
        read = local | everywhere("read", "rows", remote.ingest, away, "rows_in")
        parts = [read[i] for i in range(len(plan.parts))]
        check_not_empty(parts)
        described = job.fit(parts)
        shards = everywhere("sort", "events", remote.sort, list(range(plan.shards)), "events", parts, described)
        return job.schema(parts, described, [shards[i] for i in range(plan.shards)])
