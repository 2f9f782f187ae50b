"""What a diagnosis finds: its kind, how bad it is, the evidence and the advice, and how these are put in words."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

__all__ = [
    "KINDS", "MOST_NAMED", "SEVERITIES", "Finding", "Kind", "Measured", "Severity", "rounded",
]  # fmt: skip

Kind = Literal[
    "bad_images", "bad_labels", "module_fault", "bad_init", "dead_loss_component", "loss_imbalance", "exploding",
    "vanishing", "lr_too_high", "amp_overflow", "nonfinite_weights", "nonfinite_loss", "nonfinite_gradient",
    "loss_blowup", "silent_collapse", "dead_layer", "stalled", "loss_spike", "benign_jump", "amp_calibration",
    "always_clipped",
]  # fmt: skip
Severity = Literal["error", "warning", "info"]

KINDS: tuple[Kind, ...] = get_args(Kind)  # causes before their symptoms
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

MOST_NAMED = 5  # tensors, images


class Measured(msgspec.Struct, frozen=True):
    """A piece of evidence; the threshold is what it was held against, where there is one."""

    value: float | int | str | None
    threshold: float | int | str | None = None

    def text(self) -> str:
        """As it is shown.

        Example:
            >>> Measured(0.12345678, 0.01).text()
            '0.1235 (threshold 0.01)'
        """
        against = "" if self.threshold is None else f" (threshold {_shown(self.threshold)})"
        return f"{_shown(self.value)}{against}"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or worth knowing.

    Attributes:
        kind: What it is.
        severity: ``error``: the run is lost or wrong by it; ``warning``: look at it; ``info``: as expected.
        message: The same in a sentence.
        step: Optimizer step at which it was first seen.
        where: Layer, tensors, loss component or image paths.
        evidence: Names to numbers with their thresholds.
        advice: One sentence naming a key that exists, as ``key=value``.
    """

    kind: Kind
    severity: Severity
    message: str
    step: int | None = None
    where: str | None = None
    evidence: dict[str, Measured] = msgspec.field(default_factory=dict)
    advice: str

    def text(self) -> str:
        """As it is printed: a heading, where, the evidence, the advice."""
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"{self.severity}: {self.kind}{at}: {self.message}"]
        lines += [f"  where: {self.where}"] if self.where else []
        lines += [f"  {name}: {measured.text()}" for name, measured in self.evidence.items()]
        return "\n".join(map(_one_line, [*lines, f"  advice: {self.advice}"]))


def rounded(value: float) -> str:
    """To one significant digit, as one writes a setting."""
    return f"{float(f'{value:.1g}'):g}"


def _one_line(text: str) -> str:
    """Names of files may hold anything: a line break or a terminal's control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shown(value: float | int | str | None) -> str:
    return "not known" if value is None else value if isinstance(value, str) else f"{value:.4g}"
