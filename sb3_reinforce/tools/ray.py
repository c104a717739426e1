"""Executor for workers on a Ray cluster."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Any


class RayExecutor(Executor):
    """
    Run functions in Ray actors, which keep their environments between calls (unlike Ray tasks).

    Ray restarts an actor that dies, and retries its calls at most twice.

    :param n_workers: number of actors, with one CPU each
    :param options: options of the actors, see ``ray.remote``
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
        #: Actor -> its unfinished calls
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
            # Skip canceled futures, which never notify wait()
            wait_for([future for futures in self._futures.values() for future in futures if not future.done()])
        for actor in self._futures:
            self._kill(actor)
        self._futures = {}
