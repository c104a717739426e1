"""Workers on a Ray cluster."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Any


class RayExecutor(Executor):
    """
    Runs functions on Ray, in actors that keep their environments: a task of its own for each call costs 50 ms.

    Ray starts an actor that has died again, and what it was doing, twice at most.

    :param n_workers: number of actors, of one CPU each
    :param options: of the actors, see ``ray.remote``
    :raises ImportError: if Ray is not installed
    """

    def __init__(self, n_workers: int, **options: Any):
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"{error}. Workers on Ray need: pip install 'sb3-reinforce[ray]'") from error

        class Worker:
            def run(self, function: Callable[..., Any], *args: Any) -> Any:
                return function(*args)

        options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 2, **options}
        self._kill = ray.kill
        self._max_workers = n_workers
        #: Actor -> what it has to do
        self._futures: dict[Any, list[Future]] = {ray.remote(**options)(Worker).remote(): [] for _ in range(n_workers)}

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if not self._futures:
            raise RuntimeError("cannot schedule new futures after shutdown")
        for actor, futures in self._futures.items():
            self._futures[actor] = [future for future in futures if not future.done()]
        actor = min(self._futures, key=lambda actor: len(self._futures[actor]))
        future: Future = actor.run.remote(partial(function, **kwargs), *args).future()
        self._futures[actor].append(future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait and not cancel_futures:
            # One that was canceled is done, but nobody would tell
            wait_for([future for futures in self._futures.values() for future in futures if not future.done()])
        for actor in self._futures:
            self._kill(actor)
        self._futures = {}
