"""`yolo_gradstab.audit`: what it reads against what torch reads, and files it must refuse without running them."""

import io
import os
import pickle
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS

from yolo_gradstab.audit import AuditError, audit_checkpoint, read_tensors


@pytest.fixture(scope="module")
def model() -> Any:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    return DetectionModel(str(MODELS / "yolo26-tiny.yaml"), verbose=False)


def saved(model: Any, path: Path, *, key: str = "ema") -> Path:
    """As the host's `save_model` does: half precision, then NaN to 0 and inf to the largest half."""
    ema = deepcopy(model).half()
    for value in ema.state_dict().values():
        if value.is_floating_point():
            torch.nan_to_num_(value)
    content = {"epoch": 3, "model": None, "ema": None, "date": "today", "train_args": {"lr0": 0.01}, "path": Path("a")}
    torch.save(content | {key: ema}, path)
    return path


@pytest.mark.parametrize("key", ["ema", "model"])
def test_a_healthy_checkpoint_has_nothing_and_is_read_as_torch_reads_it(model: Any, tmp_path: Path, key: str) -> None:
    path = saved(model, tmp_path / "last.pt", key=key)
    assert audit_checkpoint(path) == []
    expected = deepcopy(model).half().state_dict()
    tensors = read_tensors(path)
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(tensors[name], value.numpy()), name


def test_a_parameter_that_carries_more_is_read_too(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    torch.nn.init.zeros_(model[0].weight)
    model[0].weight.said = "more"  # torch stores such a parameter by another function
    torch.save({"model": model}, tmp_path / "last.pt")
    assert list(read_tensors(tmp_path / "last.pt")) == ["0.weight", "0.bias"]


def test_a_tensor_of_nan_is_found_where_it_became_zero(model: Any, tmp_path: Path) -> None:
    model = deepcopy(model)
    model.model[3].conv.weight.data.fill_(torch.nan)
    model.model[3].conv.bias = None
    (found,) = audit_checkpoint(saved(model, tmp_path / "last.pt"))
    assert (found.kind, found.severity, found.where) == ("nonfinite_weights", "error", "model.3.conv.weight")
    assert found.evidence["weights that are all 0, which stands for NaN"].value == 1


def test_one_inf_is_found_where_it_became_65504(model: Any, tmp_path: Path) -> None:
    model = deepcopy(model)
    model.model[4].cv1.conv.weight.data[0, 0, 0, 0] = -torch.inf
    model.model[5].bn.running_var[2] = 1e8  # finite, and beyond half precision
    (found,) = audit_checkpoint(saved(model, tmp_path / "last.pt"))
    assert (found.severity, found.where) == ("error", "model.4.cv1.conv.weight, model.5.bn.running_var")
    share = found.evidence["largest share of such elements in one"].value
    size = model.model[5].bn.running_var.numel()
    assert share == pytest.approx(1 / size)
    model.model[4].cv1.conv.weight.data[0, 0, 0, 0] = 0
    (found,) = audit_checkpoint(saved(model, tmp_path / "last.pt"))
    assert (found.severity, found.where) == ("warning", "model.5.bn.running_var")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_dictionaries_of_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3).T.to(dtype), "a.bias": torch.zeros(3, dtype=dtype)}
    torch.save(weights, tmp_path / "good.pt")
    assert audit_checkpoint(tmp_path / "good.pt") == []
    assert np.array_equal(read_tensors(tmp_path / "good.pt")["a.weight"], weights["a.weight"].double().numpy())
    weights["a.bias"][1] = torch.nan
    torch.save(weights, tmp_path / "bad.pt")
    (found,) = audit_checkpoint(tmp_path / "bad.pt")
    assert (found.where, found.evidence["tensors holding NaN or inf"].value) == ("a.bias", 1)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"model": {"a.weight": torch.ones(3)}, "bomb": Bomb(target)}, tmp_path / "bomb.pt")
    assert audit_checkpoint(tmp_path / "bomb.pt") == []
    assert not target.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)  # the control: it is one
    assert target.exists()


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", bytes(8))
    return path


class Storage:
    """Pickled as torch's storages are, by a persistent id."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 2) if isinstance(value, Storage) else None


class Strided:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (Storage(), *self.arguments, False, None)


@pytest.mark.parametrize("arguments", [(0, (3,), (1,)), (1, (2,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (1, 1000))])
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, arguments: Any) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({"a.weight": Strided(*arguments)})
    with pytest.raises(AuditError, match="reaches outside of what is stored"):
        read_tensors(archive(tmp_path / "a.pt", buffer.getvalue()))
    buffer = io.BytesIO()  # the control: two numbers are there
    _Pickler(buffer, protocol=2).dump({"a.weight": Strided(0, (2,), (1,))})
    assert read_tensors(archive(tmp_path / "b.pt", buffer.getvalue()))["a.weight"].tolist() == [0, 0]


def test_what_is_stored_once_is_read_once_and_no_tensor_is_larger(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({f"{i}.weight": Strided(0, (2,), (1,)) for i in range(100)})
    tensors = read_tensors(archive(path, buffer.getvalue()))
    assert len({tensor.__array_interface__["data"][0] for tensor in tensors.values()}) == 1
    for size, stride in (((3,), (0,)), ((2, 2), (0, 1))):
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump({"a.weight": Strided(0, size, stride)})
        with pytest.raises(AuditError, match="a tensor has more elements than are stored"):
            read_tensors(archive(path, buffer.getvalue()))


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    # BUILD sets attributes on whatever stands on the stack, here the function that rebuilds tensors.
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"):
        content = b"\x80\x02" + name + b"}U\x08__name__U\x01xsb."
        with pytest.raises(AuditError, match="is damaged, or no checkpoint"):
            read_tensors(archive(tmp_path / "a.pt", content))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"nothing\.pt: cannot be read \(No such file or directory\)"):
        audit_checkpoint(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(AuditError, match=r"text\.pt: is not a checkpoint as torch\.save writes it"):
        audit_checkpoint(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("a/b.txt", "c")
    with pytest.raises(AuditError, match=r"other\.pt: is not a checkpoint"):
        audit_checkpoint(tmp_path / "other.pt")
    with pytest.raises(AuditError, match=r"a\.pt: is damaged, or no checkpoint"):
        audit_checkpoint(archive(tmp_path / "a.pt", b"garbage"))
    with pytest.raises(AuditError, match=r"it is compressed, which torch\.save does not do"):
        audit_checkpoint(archive(tmp_path / "a.pt", pickle.dumps({}), compression=zipfile.ZIP_DEFLATED))
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(AuditError, match=r"empty\.pt: holds no model"):
        audit_checkpoint(tmp_path / "empty.pt")
