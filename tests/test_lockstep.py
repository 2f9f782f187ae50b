"""`yolo_gradstab.lockstep`: who runs when, seen on trainers that keep a diary; the host's are in test_bench."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from yolo_gradstab.lockstep import run_in_turns


class Trainer:
    """As the host's: batches, and callbacks around each."""

    def __init__(
        self, name: str, diary: list[str], *, batches: int = 10**6, fails: bool = False, s: float = 0.0
    ) -> None:
        self.name, self.diary, self.batches, self.fails, self.s = name, diary, batches, fails, s
        self.callbacks: dict[str, Callable[[Any], None]] = {}
        diary.append(f"{name} made")

    def add_callback(self, event: str, callback: Callable[[Any], None]) -> None:
        self.callbacks[event] = callback

    def train(self) -> None:
        for batch in range(self.batches):
            time.sleep(0.01)  # loading, which is not timed
            self.diary.append(f"{self.name} loaded")
            self.callbacks["on_train_batch_start"](self)
            if self.fails and batch == 1:
                raise ValueError("broken")
            time.sleep(self.s)
            self.diary.append(f"{self.name}{batch}")
            self.callbacks["on_train_batch_end"](self)


def test_one_runs_at_a_time_in_an_order_that_turns_round() -> None:
    diary: list[str] = []
    spent_s = run_in_turns({name: lambda name=name: Trainer(name, diary) for name in "ab"}, steps=3)
    assert [line for line in diary if line[1].isdigit()] == ["a0", "b0", "b1", "a1", "a2", "b2"]
    # Whoever loads does so in its own turn, and the other waits.
    assert diary == [
        "a made", "a loaded", "a0", "a loaded", "b made", "b loaded", "b0", "b loaded",
        "b1", "b loaded", "a1", "a loaded", "a2", "b2",
    ]  # fmt: skip
    assert [len(times) for times in spent_s.values()] == [3, 3]


def test_only_the_step_is_timed() -> None:
    spent_s = run_in_turns({"a": lambda: Trainer("a", [], s=0.05), "b": lambda: Trainer("b", [])}, steps=4)
    assert min(spent_s["a"]) >= 0.05
    assert min(spent_s["b"]) < 0.01  # which is less than loading


def test_every_step_is_timed_from_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one whenever it is read: at the beginning of a batch and at its end."""
    reads = itertools.count()
    monkeypatch.setattr("yolo_gradstab.lockstep._now", lambda: float(next(reads)))
    spent_s = run_in_turns({name: lambda name=name: Trainer(name, []) for name in "abc"}, steps=3)
    assert spent_s == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_what_is_read_may_be_no_clock() -> None:
    """Here how often a trainer has been at work: once for loading, which is outside, and once in the batch."""
    diary: list[str] = []
    counts = run_in_turns(
        {name: lambda name=name: Trainer(name, diary) for name in "ab"}, steps=2, read=lambda: len(diary)
    )
    assert counts == {"a": [1, 1], "b": [1, 1]}


def test_a_run_that_breaks_ends_all_and_says_so() -> None:
    with pytest.raises(ValueError, match="broken"):
        run_in_turns({"a": lambda: Trainer("a", []), "b": lambda: Trainer("b", [], fails=True)}, steps=3)


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'b' ended after 2 of 3 batches"):
        run_in_turns({"a": lambda: Trainer("a", []), "b": lambda: Trainer("b", [], batches=2)}, steps=3)
