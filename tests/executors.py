"""Executors that complete tasks in an order, or fail at a moment, that a test has chosen."""

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from types import SimpleNamespace
from typing import Any

import numpy as np


class LazyFuture(Future):
    """
    Is worked on when its result is asked for.

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
    Runs tasks one after the other in this thread, when a result is asked for.

    :param n_workers: how many tasks it says it runs at a time
    :param run: what to do for a task, with the last two arguments of its function; None to call the function itself
    :param rng: of the order of tasks, some of which are run before anyone asks; None for the order of their submission
    :param breaks_after: number of tasks after which all of its workers are dead; None for never
    """

    def __init__(
        self,
        n_workers: int,
        run: Callable[[int, int], Any] | None = None,
        rng: np.random.Generator | None = None,
        breaks_after: int | None = None,
    ):
        self._max_workers = n_workers
        self.run = run
        self.rng = rng
        self.n_left = breaks_after
        self.is_broken = False
        #: The last two arguments of each function that was submitted, those of the tasks that were run, and the results
        self.submitted: list[tuple[int, int]] = []
        self.ran: list[tuple[int, int]] = []
        self.results: list[Any] = []
        self.waiting: list[tuple[LazyFuture, Callable[..., Any], tuple[Any, ...]]] = []
        self.most_waiting = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        if self.is_broken:
            raise BrokenExecutor("the workers are dead")
        assert not kwargs
        future = LazyFuture(self.run_one)
        self.submitted.append(args[-2:])
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
        if self.n_left == 0:
            self.is_broken = True
            for other in (future, *(task[0] for task in self.waiting if not task[0].cancelled())):
                other.set_exception(BrokenExecutor("a worker has died"))
            self.waiting = []
            return
        if self.n_left is not None:
            self.n_left -= 1
        self.ran.append(args[-2:])
        try:
            result = function(*args) if self.run is None else self.run(*args[-2:])
        except Exception as error:
            future.set_exception(error)
        else:
            self.results.append(result)
            future.set_result(result)


class FakeRay:
    """A module ``ray`` whose actors run what they are asked for one after the other, when :meth:`run_all` is called."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.actors: list[Any] = []
        self.killed: list[Any] = []

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options.append(options)

        def make(cls: type) -> Any:
            return SimpleNamespace(remote=lambda *args: self._start(cls(*args)))

        return make

    def _start(self, instance: Any) -> Any:
        actor = FakeActor(instance)
        self.actors.append(actor)
        return actor

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def run_all(self) -> None:
        for actor in self.actors:
            while actor.calls:
                args, future = actor.calls.pop(0)
                if actor in self.killed:
                    future.set_exception(RuntimeError("The actor is dead"))
                    continue
                try:
                    future.set_result(actor.instance.run(*args))
                except Exception as error:
                    future.set_exception(error)


class FakeActor:
    def __init__(self, instance: Any):
        self.instance = instance
        self.calls: list[tuple[tuple[Any, ...], Future]] = []
        self.run = SimpleNamespace(remote=self._call)

    def _call(self, *args: Any) -> Any:
        future: Future = Future()
        self.calls.append((args, future))
        return SimpleNamespace(future=lambda: future)
