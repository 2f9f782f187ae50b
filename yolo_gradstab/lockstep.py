"""Whole training runs in one process that take turns, so that each step is timed beside the other run's.

What a machine does meanwhile (heat, neighbours) hits all alike. A turn goes from the beginning of a batch to the
beginning of that run's next: loading data and closing an epoch fall into it, so that nothing else runs while a step is
timed, but only the part from a batch's beginning to its end is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["run_in_turns"]


class _Over(BaseException):
    """Ends a training from outside; no `Exception`, which the host might take for one of its own."""


class _Turns:
    """Whose turn it is; every second round goes the other way, so that no run always follows the same one."""

    def __init__(self, names: list[str]) -> None:
        self._orders = names, names[::-1]
        self._taken = 0
        self._over = False
        self._changed = threading.Condition()

    def _whose(self) -> str:
        turn, place = divmod(self._taken, len(self._orders[0]))
        return self._orders[turn % 2][place]

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._whose() == name)
            if self._over:
                raise _Over

    def end(self) -> None:
        with self._changed:
            self._taken += 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


def run_in_turns(
    make_trainers: Mapping[str, Callable[[], Any]], *, steps: int, read: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Train with each trainer, in turn, and give the seconds of each of the first `steps` batches of each.

    Args:
        make_trainers: By name, what makes a trainer of the host's, or of ours; each is made and run in a thread of its
            own, one after the other. Their runs must be longer than `steps` batches; they are ended there.
        steps: Batches of each.
        read: What is read at a batch's beginning and end, in place of a clock; the differences are given.

    Raises:
        RuntimeError: A run ended, or broke, before that.
    """
    turns, read = _Turns(list(make_trainers)), read or _now
    spent: dict[str, list[float]] = {name: [] for name in make_trainers}

    def run(name: str, make: Callable[[], Any]) -> None:
        trainer, began, is_first = None, 0.0, True

        def begin(_: Any) -> None:
            nonlocal began, is_first
            if not is_first:
                turns.end()
                turns.wait(name)
            is_first = False
            began = read()

        def end(_: Any) -> None:
            spent[name].append(read() - began)
            if len(spent[name]) == steps:
                raise _Over

        turns.wait(name)
        try:
            trainer = make()
            trainer.add_callback("on_train_batch_start", begin)
            trainer.add_callback("on_train_batch_end", end)
            trainer.train()
            raise RuntimeError(f"the run {name!r} ended after {len(spent[name])} of {steps} batches")
        except _Over:
            turns.end()
        except BaseException:
            turns.stop()
            raise

    with _without_amp_check(), ThreadPoolExecutor(len(make_trainers)) as pool:
        runs = [pool.submit(run, name, make) for name, make in make_trainers.items()]
    for over in runs:
        over.result()
    return spent


@contextmanager
def _without_amp_check() -> Iterator[None]:
    """The host tries fp16 on weights that it would download; what it finds is not what is timed."""
    from ultralytics.engine import trainer

    check = trainer.check_amp
    trainer.check_amp = lambda model: True
    try:
        yield
    finally:
        trainer.check_amp = check


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
