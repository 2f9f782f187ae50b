"""MuSGD's bf16 products in float32, rounded once, as units that have bf16 make them; with this folder in PYTHONPATH.

Without such units torch makes them in a scalar loop, some sixty times as slow as in float32. Both round what a float32
sum has come to, and differ in the order of that sum alone: by 0 to 0.8 % of the result's norm on random matrices of
16 x 144 to 256 x 256, where a bf16 number has steps of 0.4 to 0.8 %.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MUON = "ultralytics.optim.muon"


def zeropower_via_newtonschulz5(matrices: Any, eps: float = 1e-7) -> Any:
    """The host's function of this name, rounded to bf16 where it rounds."""
    import torch  # not before the program itself would

    def rounded(values: Any) -> Any:
        return values.bfloat16().float()

    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.reshape(-1, matrices.size(-2), matrices.size(-1)).bfloat16()
    x /= x.norm(dim=(-2, -1), keepdim=True) + eps
    x = (x.transpose(-2, -1) if is_tall else x).float()
    for _ in range(5):
        a = rounded(x @ x.transpose(-2, -1))
        b = rounded(torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315))
        x = rounded(torch.baddbmm(x, b, x, beta=3.4445))
    x = x.bfloat16()
    return (x.transpose(-2, -1) if is_tall else x).reshape(matrices.shape)


class Finder:
    """Puts it into the host's module when that is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The host's module with the function replaced; once."""
        del path, target
        if name != MUON:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            module.zeropower_via_newtonschulz5 = zeropower_via_newtonschulz5  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
