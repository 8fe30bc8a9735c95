"""Where the work on partitions runs: in this process, or on the workers of a Dask cluster."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Maps a function over tasks and gives the results in the order of the tasks."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results of `function`, one a task, in order, as they are wanted."""
        ...


class LocalEngine:
    """Runs every task here, one after another: one partition in memory at a time."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results in order, each computed when it is asked for.

        Args:
            function: called with each task.
            tasks: in the order of the results.
        """
        return map(function, tasks)

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: object) -> None:
        return None


class DaskEngine:
    """Runs tasks on Dask workers: a local cluster of processes, or the cluster behind a scheduler's address.

    Every worker must see the partition files and the feature cache under the same paths. At most two tasks a worker are
    under way, so that results wait in no queue longer than that.

    Args:
        address: "tcp://host:port" of a scheduler; None starts a local cluster.
        workers: processes of the local cluster.
        threads: threads of each.
        memory_limit: of each worker, as Dask takes it.
    """

    def __init__(
        self, address: str | None = None, workers: int = 2, threads: int = 1, memory_limit: str = "auto"
    ) -> None:
        try:
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise ImportError("engine 'dask' needs the extra: pip install 'ltv-stack[dask]'") from error
        self._cluster: Any = None
        if address is None:
            self._cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=threads,
                processes=True,
                memory_limit=memory_limit,
                dashboard_address=None,
            )
        self._client: Any = Client(self._cluster if address is None else address)
        log.info("dask: %d workers", self._workers())

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results in order; work runs ahead of what was asked for by two tasks a worker.

        Args:
            function: called with each task, on a worker; pickled once.
            tasks: in the order of the results; pickled one by one.
        """
        ahead = 2 * max(self._workers(), 1)
        futures = []
        shared = self._client.scatter(function, broadcast=True, hash=False)
        for number, task in enumerate(tasks):
            futures.append(self._client.submit(_call, shared, task, pure=False))
            if number + 1 >= ahead:
                yield futures.pop(0).result()
        while futures:
            yield futures.pop(0).result()

    def close(self) -> None:
        """End the connection, and the local cluster if this engine started one."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> "DaskEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _workers(self) -> int:
        return len(self._client.ncores())


def make_engine(name: str, address: str | None = None, workers: int = 2) -> LocalEngine | DaskEngine:
    """The engine a configuration names: "local" or "dask".

    Args:
        name: "local" or "dask".
        address: of a Dask scheduler; a local cluster when None.
        workers: processes of a local cluster.

    Raises:
        ValueError: another name.
    """
    if name == "local":
        return LocalEngine()
    if name == "dask":
        return DaskEngine(address, workers)
    raise ValueError(f"engine: got {name!r}, needs 'local' or 'dask'")


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)
