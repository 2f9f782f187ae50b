"""The notebooks: executed on small settings in an empty folder, with claims of theirs that must hold at that size too.

The claims are checked in the notebook's own process, after its last cell; numbers against the formulas or the tables
that the texts quote.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "notebooks"

CLAIMS = {
    # The factors are those of He et al. 2015 (ReLU: gain / sqrt 2), of a linear map, and of BatchNorm (pi / (pi - 1)).
    "01_exploding_gradients": """
        factor = dict(plain.select("network", "factor per layer").iter_rows())
        assert abs(factor["ReLU, PyTorch's default"] - 6**-0.5) < 0.01
        assert abs(factor["ReLU, He"] - 1) < 0.02 and abs(factor["linear, gain 1.1"] - 1.1) < 0.02
        assert all(abs(measured - theory) < 0.02 for _, measured, theory, *_ in plain.iter_rows())
        assert abs(bn_factors[256] - 1.2111) < 0.02 < bn_factors[16] - 1.2111
        assert 2**14 < skips["skips alone"] < 2**15 and skips["skips and BatchNorm"] < 10
        assert time_factors["linear, radius 0.8"] < 0.9 and time_factors["linear, radius 1.25"] > 1.15
        assert time_factors["tanh, radius 1.25"] < 1
        assert same_weights
        lost = {(lr, policy) for lr, policy, _, _, step in adding.iter_rows() if step is not None}
        assert lost == {(0.1, "none"), (0.1, "autoclip, median"), (0.1, "zclip")}, lost
        assert slopes["step 0"] < 0
        assert norms["clipped share"][0] == 1
    """,
    "02_train_with_gradstab": """
        assert detect.status.outcome == pose.status.outcome == "completed"
        assert len(detect.steps) == len(pose.steps) == 3
        assert detect.config["update_clip"]["max_ratio"] == pose.config["update_clip"]["max_ratio"] == 0.03
        assert refused == 2
        assert trials["id"].to_list() == ["detect", "pose"]
        assert (WORK / "report/report.html").stat().st_size > 100_000
    """,
    # The numbers are those of README.md and of results/README.md.
    "03_learning_rate_stability": """
        assert trials["steps"].to_list() == [8, 8] and trials["clipped_share"].max() > 0.5
        diverged = {(what, arm): diverged for what, arm, diverged, *_ in by_arm(stock_and_bound).iter_rows()}
        for what, none in (("detection, drawn", "5 of 10"), ("pose, drawn", "8 of 10")):
            assert diverged[what, "no clip"] == none and diverged[what, "norm 10"] == "4 of 10"
            assert diverged[what, "norm 10 + update_clip 0.03"] == "0 of 10"
        lost = {what: counts for what, *counts in saved.iter_rows()}
        assert lost["detection, drawn"] == [21, 6, 0] and lost["pose, drawn"] == [15, 6, 0]
        assert lost["detection, blood cells"] == [15, 5, 0]
        assert lost["detection, blood cells, no clip"] == [21, 8, 2]
    """,
    "04_when_it_goes_wrong": """
        assert off.status.divergence and off.metric == 0 and off.steps["nonfinite"].sum() == 0
        assert off.steps["loss"][-1] < 0.1 < min(run.steps["loss"][-1] for run in (rollback, bound))
        assert off.diagnose()[0].kind == "lr_too_high" and "silent_collapse" in {f.kind for f in off.diagnose()}
        assert outcomes["outcome"].to_list() == [off.status.divergence, "completed", "completed"]
        assert outcomes["rollbacks"][0] == outcomes["rollbacks"][2] == 0 < outcomes["rollbacks"][1]
        assert len(skipped) == 3 and broken.steps["epoch"].n_unique() == 3
        assert named[0].kind == "bad_images"
    """,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("02", "04"))) for name in CLAIMS]
)
def test_a_notebook_runs_and_what_it_claims_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTAB_NOTEBOOK", "small")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(re.sub(r"^ {8}", "", CLAIMS[name].strip("\n"), flags=re.MULTILINE)))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_every_notebook_has_claims() -> None:
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == list(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_notebook_is_kept_with_the_outputs_of_one_run_and_nothing_of_the_machine(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    first, *_, last = (cell.source for cell in notebook.cells)
    assert "What you will learn" in first
    assert "What was found" in last
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.findall(r"(?:/tmp|/home|/root|/Users|[A-Z]:\\\\)[/\\]\w+", text)
    assert len(text) < 500_000
