"""What a run folder holds beside the host's own files, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import platform
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

__all__ = ["DivergenceKind", "Outcome", "RunError", "RunFolder", "Status", "replacing", "terminable", "versions"]

Outcome = Literal["running", "completed", "diverged", "stopped", "failed", "interrupted"]
DivergenceKind = Literal["nonfinite", "blowup", "collapse"]


class RunError(ValueError):
    """A folder that is not a readable run; the message is one line and names it."""


class Status(msgspec.Struct, kw_only=True):
    """`gradstab/status.json`: how the run stands or ended.

    Attributes:
        outcome: How it ended; ``running`` also stands in the folder of a run that was killed.
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


class RunFolder:
    """Paths and small files of one run; the tables belong to `telemetry`.

    Args:
        path: The host's run folder (its `save_dir`).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gradstab = self.path / "gradstab"
        self.steps = self.gradstab / "steps"
        self.layers = self.gradstab / "layers"
        self.events = self.gradstab / "events.jsonl"

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder and save the configuration as used."""
        self.steps.mkdir(parents=True, exist_ok=True)
        self.layers.mkdir(exist_ok=True)
        text = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False)
        with replacing(self.gradstab / "config.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

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
            raise RunError(f"{self.path}: no gradstab/status.json, so not a run of yolo-gradstab") from None
        except msgspec.MsgspecError as error:
            raise RunError(f"{path}: {error}") from None

    def read_config(self) -> dict[str, Any]:
        """The configuration as used; empty when it is missing."""
        path = self.gradstab / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def append_event(self, event: dict[str, Any]) -> None:
        """Add one line to `events.jsonl`; values that JSON cannot hold become null."""
        with self.events.open("ab") as file:
            file.write(msgspec.json.encode(event) + b"\n")

    def read_events(self) -> list[dict[str, Any]]:
        """All complete lines; a kill may have left half of the last one."""
        if not self.events.is_file():
            return []
        lines = self.events.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(line) for line in lines]

    def drop_events_from(self, step: int) -> None:
        """Remove the events of this step and later ones, which a resumed run makes again."""
        events = self.read_events()
        kept = [event for event in events if event.get("step", -1) < step]
        if len(kept) < len(events):
            with replacing(self.events) as temporary:
                temporary.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in kept))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, in one rename, if the block ends without an error."""
    # Not made by `tempfile`, which would leave the file readable to nobody else; a run folder is shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
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


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("yolo-gradstab", "ultralytics", "torch", "numpy", "polars"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source folder, as on a machine without a network
            found[name] = "not installed"
    return found
