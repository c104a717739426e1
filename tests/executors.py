"""Executors that complete tasks in an order, or fail at a moment, that a test chooses."""

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from types import SimpleNamespace
from typing import Any

import numpy as np


class LazyFuture(Future):
    """
    A future whose tasks run when its result is requested.

    :param work: completes one task of the executor
    """

    def __init__(self, work: Callable[[], None]):
        super().__init__()
        self.work = work

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self.work()
        return super().result(0)


class FakeExecutor(Executor):
    """
    Runs tasks on a range, the last argument of their function, in this thread when a result is requested.

    :param n_workers: number of tasks that it claims to run at a time
    :param run: replaces the submitted function, with the range; None to call the function itself
    :param rng: generator of the order of tasks, some of which run at once; None for the order of submission
    :param breaks_after: number of tasks after which all workers are dead; None for never
    """

    def __init__(
        self,
        n_workers: int,
        run: Callable[[range], Any] | None = None,
        rng: np.random.Generator | None = None,
        breaks_after: int | None = None,
    ):
        self._max_workers = n_workers
        self.run = run
        self.rng = rng
        self.n_left = breaks_after
        #: Ranges that were submitted, ranges that were run, and their results
        self.submitted: list[range] = []
        self.ran: list[range] = []
        self.results: list[Any] = []
        self.waiting: list[tuple[LazyFuture, Callable[..., Any], tuple[Any, ...]]] = []
        self.most_waiting = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self.n_left == -1:
            raise BrokenExecutor("the workers are dead")
        future = LazyFuture(self.run_one)
        self.submitted.append(args[-1])
        self.waiting = [task for task in self.waiting if not task[0].cancelled()]
        self.waiting.append((future, function, args))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        while self.waiting and self.rng is not None and self.rng.random() < 0.3:
            self.run_one()
        return future

    def run_one(self) -> None:
        index = 0 if self.rng is None else int(self.rng.integers(len(self.waiting)))
        future, function, args = self.waiting.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        if self.n_left is not None:
            self.n_left -= 1
            if self.n_left == -1:
                for other in (future, *(task[0] for task in self.waiting if not task[0].cancelled())):
                    other.set_exception(BrokenExecutor("a worker has died"))
                self.waiting = []
                return
        self.ran.append(args[-1])
        self.results.append(function(*args) if self.run is None else self.run(args[-1]))
        future.set_result(self.results[-1])


class FakeRay:
    """A module ``ray`` whose actors run their calls one after the other when :meth:`run_all` is called."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.actors: list[Any] = []
        self.killed: list[Any] = []

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options.append(options)
        return lambda cls: SimpleNamespace(remote=lambda *args: self._start(cls(*args)))

    def _start(self, instance: Any) -> Any:
        self.actors.append(FakeActor(instance))
        return self.actors[-1]

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def run_all(self) -> None:
        for actor in self.actors:
            while actor.calls:
                args, future = actor.calls.pop(0)
                try:
                    if actor in self.killed:
                        raise RuntimeError("The actor is dead")
                    future.set_result(actor.instance.run(*args))
                except Exception as error:
                    future.set_exception(error)


class FakeActor:
    def __init__(self, instance: Any):
        self.instance = instance
        self.calls: list[tuple[tuple[Any, ...], Future]] = []
        self.run = SimpleNamespace(remote=self._call)

    def _call(self, *args: Any) -> Any:
        self.calls.append((args, Future()))
        future = self.calls[-1][1]
        return SimpleNamespace(future=lambda: future)
