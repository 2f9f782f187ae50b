"""What a run folder holds beside the host's own files, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

fcntl: Any  # mypy knows the platform it runs on, not the others
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "DivergenceKind", "Outcome", "RunError", "RunFolder", "Status", "gave_up_on_nan", "locked", "make_out", "one_line",
    "replacing", "terminable", "uninterrupted", "versions",
]  # fmt: skip

Outcome = Literal["running", "completed", "diverged", "stopped", "failed", "interrupted"]
DivergenceKind = Literal["nonfinite", "blowup", "collapse"]


RESUME_WRITES = ("model", "data", "resume")  # of the host's arguments, in the run's own file
MAX_LINE = 400  # characters of another's error: a path and a sentence


class RunError(ValueError):
    """A folder that is not a readable run; the message is one line and names it."""


def one_line(error: Exception) -> str:
    """What an error says, in one line of bounded length; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def make_out(folder: Path, refusal: type[ValueError], *, part: str = "") -> None:
    """Make the folder that `out` names, and a part of it.

    Raises:
        ValueError: It cannot be made; of the type given, in one line.
    """
    try:
        (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"out={folder}: cannot be made ({error.strerror}); name another folder") from None


class Status(msgspec.Struct, kw_only=True):
    """`gradstab/status.json`: how the run stands or ended.

    Attributes:
        outcome: How it ended. In the file, ``running`` also of a run that was killed; `Run.status` knows better.
        divergence: Which kind, or null.
        step: Optimizer steps recorded so far.
        reason: In words, for every outcome but ``running`` and ``completed``.
        metrics: The host's last metrics; a value that is not finite is null.
        versions: Of the packages that decide the numbers.
        seconds: Training time, all resumed parts together.
    """

    outcome: Outcome = "running"
    divergence: DivergenceKind | None = None
    step: int = 0
    reason: str | None = None
    metrics: dict[str, float | None] = msgspec.field(default_factory=dict)
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    seconds: float = 0.0


def gave_up_on_nan(status: Status) -> bool:
    """Whether the host ended the run since its loss, fitness or checkpoint was not finite, by its own words."""
    # Those of its `BaseTrainer._handle_nan_recovery`; a NaN in the text of any other error says nothing of the run.
    return status.outcome == "failed" and any(words in (status.reason or "") for words in ("NaN persisted", "NaN/Inf"))


POLL_S = 0.2  # between tries to take a lock
HOLD_WAIT_S = 1.0  # a process that has just ended, or one that looks whether the folder is held, holds it for a moment

_held: dict[Path, int] = {}  # run folders that this process has taken, and the open lock of each


class RunFolder:
    """Paths and small files of one run; the tables belong to `telemetry`.

    The process that writes a run holds a lock in its folder, which ends with the process however that ends: no other
    writes there meanwhile, and a run that says it is running, and is not, is told from one that is. (Without `fcntl`,
    on Windows, and on storage without locks there is none. Locks must reach between the machines that share storage.)

    Args:
        path: The host's run folder (its `save_dir`).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gradstab = self.path / "gradstab"
        self.steps = self.gradstab / "steps"
        self.layers = self.gradstab / "layers"
        self.events = self.gradstab / "events.jsonl"
        self.lock = self.gradstab / "lock"

    def hold(self) -> None:
        """Take the folder for this process, until `release` or its end.

        Raises:
            RunError: Another process writes into it.
        """
        key = self.path.absolute()
        if fcntl is None or key in _held:
            return
        self.gradstab.mkdir(parents=True, exist_ok=True)
        file = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
        deadline_s = time.monotonic() + HOLD_WAIT_S

        def waiting() -> bool:
            if time.monotonic() > deadline_s:
                raise BlockingIOError
            return True

        try:
            _take(file, waiting)
        except BlockingIOError:
            os.close(file)
            raise RunError(
                f"{self.path}: another process is training into this folder; wait for it, or give another name="
            ) from None
        except OSError:  # no locks on this storage: better none than one that says the run has been left
            os.close(file)
            self.lock.unlink()
            return
        _held[key] = file

    def release(self) -> None:
        """Let go of the folder; nothing happens where it is not held."""
        file = _held.pop(self.path.absolute(), None)
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def is_left(self) -> bool:
        """Whether a process had taken the folder, and holds it no more."""
        if fcntl is None or not self.lock.is_file():
            return False
        file = os.open(self.lock, os.O_RDONLY)  # also on a read-only disk
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    def is_held(self) -> bool:
        """Whether a process holds the folder; where there are no locks nothing says so."""
        return self.lock.is_file() and fcntl is not None and not self.is_left()

    def tidy(self, *, new: bool) -> None:
        """Remove what processes that were killed had not renamed into place; for a new run, an older one's records."""
        patterns = (".*.tmp", "weights/.*.tmp", "gradstab/**/.*.tmp", "gradstab/**/.*.old")
        for path in [path for pattern in patterns for path in self.path.glob(pattern)]:
            _remove(path)
        if new:
            names = ("status.json", "config.yaml", "args.yaml", "events.jsonl", "steps", "layers", "incidents")
            for name in names:
                _remove(self.gradstab / name)

    def keep_args(self) -> None:
        """Keep the host's arguments as the run was begun, before a resume writes its own over them."""
        first, kept = self.path / "args.yaml", self.gradstab / "args.yaml"
        if first.is_file() and self.gradstab.is_dir() and not kept.is_file():
            with replacing(kept) as temporary:
                temporary.write_bytes(first.read_bytes())

    def read_args(self) -> dict[str, Any]:
        """The host's arguments, with model and data of a resumed run as it was begun; empty when they are missing.

        Raises:
            RunError: They are damaged.
        """
        first = _read_mapping(self.gradstab / "args.yaml")
        # A resume's own are its checkpoint and a copy of the data's description, which say nothing about the run.
        return _read_mapping(self.path / "args.yaml") | {key: first[key] for key in RESUME_WRITES if key in first}

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder and save the configuration as used."""
        self.steps.mkdir(parents=True, exist_ok=True)
        self.layers.mkdir(exist_ok=True)
        self.events.touch()
        text = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
        with replacing(self.gradstab / "config.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def has_status(self) -> bool:
        """Whether a run has begun here, or ended."""
        return (self.gradstab / "status.json").is_file()

    def write_status(self, status: Status) -> None:
        """Replace the status in one rename."""
        with replacing(self.gradstab / "status.json") as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(status), indent=2))

    def read_status(self) -> Status:
        """Read the status.

        Raises:
            RunError: It is missing or damaged.
        """
        path = self.gradstab / "status.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Status)
        except OSError:
            if self.lock.is_file():  # it is still being set up, or never got further
                return Status()
            raise RunError(f"{self.path}: no gradstab/status.json, so not a run of yolo-gradstab") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: {error}") from None

    def read_config(self) -> dict[str, Any]:
        """The configuration as used; empty when it is missing.

        Raises:
            RunError: It is damaged.
        """
        return _read_mapping(self.gradstab / "config.yaml")

    def checkpoint(self) -> Path | None:
        """The run's `last.pt`, if it has written one: a folder that is used again may hold that of another run."""
        last, config = self.path / "weights" / "last.pt", self.gradstab / "config.yaml"
        if not last.is_file() or not config.is_file():
            return None
        is_resumed = (self.gradstab / "args.yaml").is_file()  # its configuration is written anew, its checkpoint older
        return last if is_resumed or last.stat().st_mtime >= config.stat().st_mtime else None

    def append_event(self, event: dict[str, Any]) -> None:
        """Add one line to `events.jsonl`; values that JSON cannot hold become null."""
        line = msgspec.json.encode(event) + b"\n"
        with self.events.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):  # the disk is full; half a line would spoil the next one
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.events))

    def read_events(self) -> list[dict[str, Any]]:
        """All complete lines; a kill may have left half of the last one.

        Raises:
            RunError: One of them is no JSON object.
        """
        if not self.events.is_file():
            return []
        lines = self.events.read_bytes().split(b"\n")[:-1]
        events = []
        for number, line in enumerate(lines, 1):
            try:
                events.append(msgspec.json.decode(line, type=dict[str, Any]))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise RunError(f"{self.events}: line {number}: {error}") from None
        return events

    def num_events(self) -> int:
        """Lines of `events.jsonl` so far."""
        return self.events.read_bytes().count(b"\n") if self.events.is_file() else 0

    def drop_from(self, step: int, *, num_events: int | None = None) -> None:
        """Remove events and incidents of this step and later ones, which a resumed run makes again.

        Args:
            step: The first that is made again.
            num_events: How many events there were before it; all where not given. Some are of the step before, and
                written when the next has shown them.

        Raises:
            RunError: An event is no JSON object.
        """
        kept = [event for event in self.read_events()[:num_events] if event.get("step", -1) < step]
        self._rewrite(self.events, b"".join(msgspec.json.encode(event) + b"\n" for event in kept))
        for incident in (self.gradstab / "incidents").glob("[0-9]*"):
            if incident.name.isdecimal() and int(incident.name) >= step:
                _remove(incident)

    def drop_results_after(self, epoch: int) -> None:
        """Remove the rows of later epochs (counted from 1) from the host's `results.csv`, to which it will append."""
        path = self.path / "results.csv"
        if not path.is_file():
            return
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        kept = [line for number, line in enumerate(lines) if number == 0 or int(line.split(b",")[0]) <= epoch]
        self._rewrite(path, b"".join(kept))

    def _rewrite(self, path: Path, content: bytes) -> None:
        if path.is_file() and path.read_bytes() != content:
            with replacing(path) as temporary:
                temporary.write_bytes(content)


def _forget() -> None:
    """In a forked process, such as a loader's worker, whose copies of the open locks would outlive the run's."""
    for file in _held.values():
        os.close(file)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, in one rename, if the block ends without an error."""
    # Not made by `tempfile`, which would leave the file readable to nobody else; a run folder is shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:  # a disk that is full does not say which file there was no room for
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, as a cluster or `kill` sends it, unwinds the stack instead of ending the process at once.

    It becomes a `SystemExit`; only the main thread may set handlers, others are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM that come within take effect at its end, so that what belongs together is done together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def locked(path: Path, wait: Callable[[], bool] | Literal[False] = False) -> Iterator[int | None]:
    """Hold a lock on a file; gives a descriptor that a child may inherit, and with it the lock.

    Args:
        path: Made where it is missing; left behind.
        wait: Asked, while another process holds it, whether to go on waiting; without it there is none.

    Raises:
        BlockingIOError: It is held, and there is no waiting.
    """
    if fcntl is None:
        yield None
        return
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(held, wait)
        yield held
    finally:
        os.close(held)  # of several holders the last one to close it releases the lock


def _take(held: int, wait: Callable[[], bool] | Literal[False]) -> None:
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if not wait():
                return
            time.sleep(POLL_S)
        else:
            return


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("yolo-gradstab", "ultralytics", "torch", "numpy", "polars"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source folder, as on a machine without a network
            found[name] = "not installed"
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of keys; empty when it is missing.

    Raises:
        RunError: It is damaged.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: must hold keys and values, got {type(content).__name__}")
    return content
