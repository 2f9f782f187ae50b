"""Where a batch first goes bad: rerun it with hooks, from the images to the gradients, and name the place.

Needs torch and a model when called; importing this module loads neither torch nor ultralytics, so that what was found
can be read anywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.autograd.graph import Node

__all__ = [
    "HUGE_PIXEL",
    "FirstBad",
    "first_bad_words",
    "listed",
    "localise",
    "localise_worst",
    "same_place",
    "seeded",
    "tensors_in",
    "unwrapped",
]

# Above which the images themselves are where it went bad: 0 to 1 is normal, standardised images of little contrast
# reach 20, and images left at 0..255 are beyond.
HUGE_PIXEL = 100.0
AMPLIFIED = 100.0  # largest value out over largest in, against the median of the modules of that type
AMPLIFIED_MIN = 1e3  # the least output that counts: BatchNorm lifts a near-zero input to about 1, soundly
AMPLIFIED_MODULES = 3  # of a type, below which its median says nothing
NUM_LISTED = 8  # names in a note
SEED = 0  # of every rerun and of fresh weights, so that a replay draws what the capture drew


class FirstBad(msgspec.Struct, kw_only=True, frozen=True):
    """Where a batch first goes bad.

    Attributes:
        where: The images, a module's output, the loss, or a gradient on its way back.
        module: Dotted name, or null where it is none: the input, the loss, an operation between modules.
        type: Its class, or the name of the operation.
        what: Not finite, or far larger than it came in.
        input_max, output_max: Largest absolute finite values on both sides of that place.
        component: Of the loss: the one that is not finite, or the largest.
        note: In words.
    """

    where: Literal["input", "forward", "loss", "backward"]
    what: Literal["nonfinite", "amplified"] = "nonfinite"
    module: str | None = None
    type: str | None = None
    input_max: float | None = None
    output_max: float | None = None
    component: str | None = None
    note: str = ""


def same_place(one: FirstBad | None, other: FirstBad | None) -> bool:
    """Whether two reruns went bad at the same place, whatever the values there."""
    if one is None or other is None:
        return one is other
    return (one.where, one.what, one.module, one.component) == (other.where, other.what, other.module, other.component)


def first_bad_words(found: FirstBad | None) -> str:
    """One line.

    Example:
        >>> first_bad_words(FirstBad(where="forward", module="model.0.conv", type="Conv2d", input_max=1.0))
        'forward, model.0.conv (Conv2d): not finite; largest value in 1, out none finite'
    """
    if found is None:
        return "nowhere: everything is finite and nothing stands out"
    place = found.module or ""
    if found.type:
        place += f" ({found.type})" if place else found.type
    if found.component:
        place += f"{' ' if place else ''}component {found.component}"
    what = "not finite" if found.what == "nonfinite" else "far larger than it came in"
    if found.where == "input":
        what = "not finite" if found.what == "nonfinite" else "far beyond 0..1"
    text = f"{found.where}{', ' if place else ''}{place}: {what}"
    if found.input_max is not None or found.output_max is not None:
        came, went = ("none finite" if v is None else f"{v:.4g}" for v in (found.input_max, found.output_max))
        text += f"; largest value {came}" if found.where == "input" else f"; largest value in {came}, out {went}"
    return text + (f"; {found.note}" if found.note else "")


def localise(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    autocast_dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> FirstBad | None:
    """Rerun a batch with hooks and find where it first goes bad; the model is left as it was, gradients included.

    In this order: images that are not finite or far beyond 0..1; the first module in order of execution whose output
    is not finite though its input is; the loss component that is not finite; the first operation on the way back that
    turns a finite gradient into one that is not, and its module. Where all is finite: the first module whose largest
    output, over its largest input, is more than 100 times the median of the modules of its type, and above 1000.

    Args:
        model: A host model (also wrapped for DDP or compiled) whose `loss(batch, preds)` gives the loss and a
            dictionary of its components; in the mode it is trained in.
        batch: As `preprocess_batch` leaves it, on the model's device.
        autocast_dtype: Of mixed precision; None runs in full.
        scale: By which the loss is multiplied before the backward pass (a gradient scaler's).
    """
    import torch

    images = batch["img"]
    found = _bad_input(images)
    if found is not None:
        return found
    whole = unwrapped(model)
    with _undisturbed(whole), torch.enable_grad(), _autocast(images.device, autocast_dtype), _Trace(whole) as trace:
        preds = whole(images)
        found = trace.first_nonfinite()
        if found is not None:
            return found
        if not _all_finite(preds):
            return FirstBad(where="forward", note=f"in an operation between modules{trace.where_it_went()}")
        loss, items = whole.loss(dict(batch), preds)
        found = trace.first_nonfinite() or _bad_loss(whole, batch, preds, loss, items)  # a loss may call modules too
        if found is not None:
            return found
        parameters = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        found = trace.first_bad_gradient(loss.sum() * scale, parameters)
        return found or trace.first_amplified(component=_largest(items))


def _bad_input(images: Tensor) -> FirstBad | None:
    import torch

    largest = _largest_finite(images)
    bad = [i for i, is_bad in enumerate((~images.isfinite()).flatten(1).any(1).tolist()) if is_bad]
    if bad:
        return FirstBad(where="input", input_max=largest, note=f"image {listed(bad)} of {len(images)}")
    huge = torch.nonzero(images.abs().flatten(1).amax(1) > HUGE_PIXEL).flatten().tolist()
    if huge:
        note = f"image {listed(huge)} of {len(images)}"
        return FirstBad(where="input", what="amplified", input_max=largest, note=note)
    return None


def _bad_loss(
    model: Any, batch: Mapping[str, Any], preds: Any, loss: Tensor, items: dict[str, Tensor]
) -> FirstBad | None:
    if math.isfinite(float(loss.detach().sum())):
        return None
    bad = [name for name, value in items.items() if not math.isfinite(float(value))]
    note = ""
    if not bad and hasattr(model.criterion, "one2many"):
        # The host logs the components of the one-to-one branch alone.
        branch = model.criterion.one2many
        items = branch.loss(branch.parse_output(preds)["one2many"], dict(batch))[1]
        bad = [name for name, value in items.items() if not math.isfinite(float(value))]
        note = "in the one-to-many branch, whose components are not logged"
    if len(bad) > 1:
        note = "; ".join([*filter(None, [note]), f"also {', '.join(bad[1:])}"])
    return FirstBad(
        where="loss",
        component=bad[0] if bad else _largest(items),
        input_max=_largest_finite(preds),
        output_max=_largest_finite(loss),
        note=note,
    )


class _Pass(NamedTuple):
    """One execution of one module; `before` and `after` are (all finite, largest finite value), still on the device."""

    module: nn.Module
    name: str
    before: Tensor
    after: Tensor


class _Trace:
    """Hooks on every module for one forward pass, and on every operation of its graph for the way back.

    Modules are named by the place they are called from, since one instance may stand in many places (the host's
    activations). Gradients are watched at the operations of the graph rather than by module hooks, which in-place
    activations forbid; an operation belongs to the innermost module that it was made in.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        self._passes: list[_Pass] = []
        self._running: list[tuple[str, Tensor | None, list[Node]]] = []
        self._owners: dict[Node, tuple[str, str]] = {}  # of an operation: the module's name and class
        self._handles: list[Any] = []

    def __enter__(self) -> _Trace:
        for module in self._model.modules():
            if module is not self._model:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._owners.clear()  # with the graph's operations, whose hooks lead back here

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = tensors_in([args, kwargs])
        inputs = [t.grad_fn for t in tensors if t.grad_fn is not None]
        self._running.append((self._name(module), _state(tensors) if tensors else None, inputs))

    def _after(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        name, before, inputs = self._running.pop()
        tensors = tensors_in(output)
        if before is not None and tensors:
            self._passes.append(_Pass(module, name, before, _state(tensors)))
        for node in _operations((t.grad_fn for t in tensors), until=inputs):
            self._owners.setdefault(node, (name, type(module).__name__))

    def _name(self, module: nn.Module) -> str:
        names = self._names[id(module)]
        if self._running:
            caller = self._running[-1][0] + "."
            names = [name for name in names if name.startswith(caller)] or names
        return names[0]

    def _read(self) -> Iterator[tuple[_Pass, tuple[bool, float], tuple[bool, float]]]:
        """Every pass in order of execution, read from the device at once."""
        import torch

        values = [torch.cat([one.before, one.after]) for one in self._passes]
        rows = torch.stack(values).tolist() if values else []
        for one, (fine, largest, fine_after, largest_after) in zip(self._passes, rows, strict=True):
            yield one, (bool(fine), largest), (bool(fine_after), largest_after)

    def first_nonfinite(self) -> FirstBad | None:
        for one, (fine, largest), (fine_after, largest_after) in self._read():
            if fine and not fine_after:
                return FirstBad(
                    where="forward",
                    module=one.name,
                    type=type(one.module).__name__,
                    input_max=largest,
                    output_max=_known(largest_after),
                    note=_nonfinite_weights_note(one.module),
                )
        return None

    def where_it_went(self) -> str:
        """The first module that was given what is not finite, for a note."""
        fed = next((one.name for one, (fine, _), _ in self._read() if not fine), None)
        return f", before {fed}" if fed else ""

    def first_amplified(self, *, component: str | None) -> FirstBad | None:
        ratios: dict[type, list[float]] = {}
        leaves = [
            (one, largest, largest_after)
            for one, (_, largest), (_, largest_after) in self._read()
            if largest > 0 and not any(True for _ in one.module.children())
        ]
        for one, largest, largest_after in leaves:
            ratios.setdefault(type(one.module), []).append(largest_after / largest)
        for one, largest, largest_after in leaves:
            others = ratios[type(one.module)]
            if len(others) < AMPLIFIED_MODULES or largest_after <= AMPLIFIED_MIN:
                continue
            usual = median(others)
            if largest_after / largest > AMPLIFIED * usual:
                return FirstBad(
                    where="forward",
                    what="amplified",
                    module=one.name,
                    type=type(one.module).__name__,
                    input_max=largest,
                    output_max=largest_after,
                    component=component,
                    note=f"times {largest_after / largest:.3g}, where the median of its type is times {usual:.3g}",
                )
        return None

    def first_bad_gradient(self, total: Tensor, parameters: Mapping[str, Tensor]) -> FirstBad | None:
        import torch

        turned: list[FirstBad] = []  # operations that turn a finite gradient into one that is not
        reached: list[FirstBad] = []  # operations that such a gradient reaches, whatever made it

        def watch(node: Node) -> Callable[[Any, Any], None]:
            def look(grad_inputs: Any, grad_outputs: Any) -> None:
                if turned:
                    return
                if not _all_finite(grad_outputs):
                    if not reached:
                        note = "where gradients of several branches add up"
                        reached.append(self._place(node, grad_outputs, grad_inputs, note))
                elif not _all_finite(grad_inputs):
                    turned.append(self._place(node, grad_outputs, grad_inputs, f"at {node.name()}"))

            return look

        if total.grad_fn is None or not parameters:
            return None
        handles = [node.register_hook(watch(node)) for node in _operations([total.grad_fn])]
        try:
            grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        bad = [name for name, grad in zip(parameters, grads, strict=True) if not _all_finite(grad)]
        if not bad:  # whatever was met on the way did not arrive
            return None
        if turned or reached:
            return (turned or reached)[0]
        # A weight that is used in several places; the last in forward order is nearest the origin.
        module = bad[-1].rpartition(".")[0]
        return FirstBad(where="backward", module=module, note=f"where the gradients of {bad[-1]} add up")

    def _place(self, node: Node, grad_outputs: Any, grad_inputs: Any, note: str) -> FirstBad:
        module, kind = self._owners.get(node, (None, node.name()))
        return FirstBad(
            where="backward",
            module=module,
            type=kind,
            input_max=_largest_finite(grad_outputs),
            output_max=_largest_finite(grad_inputs),
            note=note if module else f"{note}, in the loss",
        )


def _operations(ends: Iterable[Node | None], *, until: Iterable[Node] = ()) -> list[Node]:
    """Operations of the graph from these ends backwards, short of some."""
    seen = set(until)
    found: list[Node] = []
    pending = [node for node in ends if node is not None]
    while pending:
        node = pending.pop()
        if node in seen or hasattr(node, "variable"):  # which is where a parameter's gradient is kept
            continue
        seen.add(node)
        found.append(node)
        pending.extend(before for before, _ in node.next_functions if before is not None)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Floating-point tensors with elements, in any nesting of lists, tuples and dictionaries."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _state(tensors: Sequence[Tensor]) -> Tensor:
    """(1 if all are finite, largest absolute finite value or -1 where there is none), on the device."""
    import torch

    finite = torch.stack([t.detach().isfinite().all() for t in tensors]).all()
    largest = [t.detach().float().abs().nan_to_num_(nan=-1.0, posinf=-1.0).amax() for t in tensors]
    return torch.stack([finite.float(), torch.stack(largest).amax()])


def _largest_finite(value: Any) -> float | None:
    tensors = tensors_in(value)
    return _known(float(_state(tensors)[1])) if tensors else None


def _known(largest: float) -> float | None:
    return None if largest < 0 else largest


def _all_finite(tensors: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(tensors))


def _nonfinite_weights_note(module: nn.Module) -> str:
    bad = [name for name, p in module.named_parameters() if not _all_finite([p.detach()])]
    return f"its {listed(bad)} is not finite" if bad else ""


def _largest(items: dict[str, Tensor]) -> str | None:
    finite = {name: float(value) for name, value in items.items() if math.isfinite(float(value))}
    return max(finite, key=lambda name: finite[name]) if finite else None


def listed(values: Sequence[Any], *, most: int = NUM_LISTED) -> str:
    """The first few, and how many more."""
    shown = ", ".join(str(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def unwrapped(model: nn.Module) -> Any:
    """The host's model inside of what DDP or compilation put around it."""
    from ultralytics.utils.torch_utils import unwrap_model

    return unwrap_model(model)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Buffers (BatchNorm's statistics), random states and the loss are put back; the block draws from `SEED`."""
    import torch

    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    criterion = {name: value for name, value in vars(model).items() if name == "criterion"}
    with seeded():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
            vars(model).pop("criterion", None)  # which the first loss makes
            vars(model).update(criterion)


@contextmanager
def seeded() -> Iterator[None]:
    """Every global random state at `SEED` inside, and afterwards as it was."""
    import torch

    # Asking for CUDA's states would start CUDA; seeding through torch would reach a CUDA that is started later.
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    saved_cuda = torch.cuda.get_rng_state_all() if cuda else []
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    torch.default_generator.manual_seed(SEED)
    if cuda:
        torch.cuda.manual_seed_all(SEED)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.set_rng_state(saved[2])
        if cuda:
            torch.cuda.set_rng_state_all(saved_cuda)


def localise_worst(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    nonfinite: bool,
    autocast_dtype: torch.dtype | None,
    scale: float,
) -> tuple[int, FirstBad | None]:
    """Which of a step's micro-batches shows its trouble, and where that first goes bad.

    The first whose loss is not finite, else the one with the largest loss; where the step's gradient is not finite
    (`nonfinite`), the first in this order that shows it.
    """
    losses = [0.0]
    if len(batches) > 1:
        losses = [_loss(model, batch, autocast_dtype=autocast_dtype) for batch in batches]
    order = sorted(range(len(losses)), key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf)
    first = None
    for index in order:
        found = localise(model, batches[index], autocast_dtype=autocast_dtype, scale=scale)
        if index == order[0]:
            first = found
        if not nonfinite or (found is not None and found.what == "nonfinite"):
            return index, found
    return order[0], first


def _loss(model: Any, batch: Mapping[str, Any], *, autocast_dtype: torch.dtype | None) -> float:
    import torch

    with _undisturbed(model), torch.no_grad(), _autocast(batch["img"].device, autocast_dtype):
        return float(model.loss(dict(batch))[0].sum())
