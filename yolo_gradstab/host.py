"""Is the host the one that the trainer was written against, and what does it say of its arguments?

The trainer stands in for some of the host's methods and counts on what others do between them. A release that changes
one may still work, or may train on without a word and not as stock does. So digests of their code are compared with
those of the releases that the test suite has been run on, and what differs is said when a run starts.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["TESTED", "changed_methods", "check_arguments", "code_digest", "warning"]

# Oldest and newest that the tests have passed with: all of them, or of the oldest torch those that train and measure.
TESTED = {"ultralytics": ("8.4.183", "8.4.190"), "torch": ("2.11.0", "2.15.0"), "python": ("3.11", "3.12")}

# Of the host's BaseTrainer; the code of every tested release.
KNOWN = {
    "optimizer_step": {"41cd391419"},
    "_do_train": {"2d46789899"},
    "_setup_train": {"d23485eb4c"},
    "_get_warmup_iterations": {"6e228cf8be"},
    "_handle_nan_recovery": {"f913a2f7d3"},
    "save_model": {"ebaefd92ae"},
    "_load_checkpoint_state": {"7de2518974"},
    "check_resume": {"503eecc92b"},
    "resume_training": {"f6c947023d"},
    "validate": {"09fda3cee9"},
    "final_eval": {"e87630d7d4"},
}


def code_digest(function: Callable[..., Any]) -> str:
    """Ten hexadecimal digits of a function's code, without its docstring, comments and blank lines.

    Raises:
        OSError: Its source is not there to be read.
    """
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.FunctionDef)
    first = definition.body[0]
    left_out: range = range(0)
    if ast.get_docstring(definition) is not None:
        left_out = range(first.lineno, (first.end_lineno or first.lineno) + 1)
    code = [
        line.rstrip()
        for number, line in enumerate(lines, 1)
        if number not in left_out and line.strip() and not line.strip().startswith("#")
    ]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:10]


def changed_methods(trainer: type) -> list[str]:
    """Names of the host's methods that are missing, or whose code is that of no release we were tested with.

    Args:
        trainer: The host's `BaseTrainer`.
    """
    return [name for name, known in KNOWN.items() if _digest(getattr(trainer, name, None)) not in known]


def _digest(function: Callable[..., Any] | None) -> str:
    try:
        return "" if function is None else code_digest(function)
    except OSError:
        return ""


def warning(trainer: type, version: str) -> str | None:
    """One line where the host is not one that we were tested with; None where it is."""
    changed = changed_methods(trainer)
    if not changed:
        return None
    oldest, newest = TESTED["ultralytics"]
    return (
        f"Ultralytics {version}: {', '.join(changed)} differ{'s' if len(changed) == 1 else ''} from the code that "
        f"yolo_gradstab was tested with; if anything looks wrong, install ultralytics>={oldest},<={newest}"
    )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """The host's own checks of training arguments, without the help page that it logs before it raises.

    Raises:
        SyntaxError: A key is unknown to it; the message is its help page.
        TypeError: A value is of another type than its key's, in one line.
        ValueError: A value is beyond its key's range, in one line.
    """
    from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
    from ultralytics.utils import LOGGER

    level = LOGGER.level
    LOGGER.setLevel("CRITICAL")
    try:
        get_cfg(DEFAULT_CFG_DICT, dict(arguments))
    finally:
        LOGGER.setLevel(level)
