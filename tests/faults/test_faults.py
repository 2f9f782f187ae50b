"""The suite of faults: its size, how it scores, and a few of its runs; all of them are `make faults`."""

from pathlib import Path

import polars as pl
import pytest
from conftest import DrawnSet

from faults.faults import FAULTS
from faults.healthy import HEALTHY
from faults.run import Notice, Result, judge, main, onset, score
from faults.training import IMAGES, SIZE, Case, train_case
from yolo_gradstab.diagnosis import KINDS

pytestmark = pytest.mark.filterwarnings("default")  # the host's own warnings are not ours to fail on

# One of each way to break a run: files, model, loss, arguments, weights.
REPRESENTATIVE = [
    "a float array with a NaN hole", "a logarithm of a negative value", "one layer times 1e4", "defaults",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("a loss weight that leaps to 1e4", "box gain 0")),
]  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DrawnSet]:
    folder = tmp_path_factory.mktemp("sets")
    return {task: DrawnSet(folder / task, task, images=IMAGES, size=SIZE) for task in ("detect", "pose")}


def test_every_kind_of_finding_has_faults_of_both_tasks_beside_healthy_runs() -> None:
    assert {kind for case in FAULTS for kind in case.kinds} == set(KINDS)
    assert all(1 <= len(case.kinds) <= 3 for case in FAULTS)
    assert not any(case.kinds for case in HEALTHY)
    for cases, least in ((FAULTS, 40), (HEALTHY, 20)):
        assert len(cases) >= least
        assert {case.task for case in cases} == {"detect", "pose"}
    names = [case.name for case in (*FAULTS, *HEALTHY)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_first_finding_names_the_fault(sets: dict[str, DrawnSet], tmp_path: Path, name: str) -> None:
    (case,) = [case for case in (*FAULTS, *HEALTHY) if case.name == name]
    outcome = train_case(case, sets[case.task], tmp_path)
    assert outcome.error is None
    result = judge(case, tmp_path, outcome)
    if case.kinds:
        assert outcome.acted is not None or case.args  # the fault was there
        assert result.is_named, result.findings
    else:
        assert not result.errors, result.findings
    assert result.notice is None or result.notice.in_time
    if case.trouble is not None:
        assert result.notice is not None


def result(*findings: tuple[str, str, int | None], kinds: tuple[str, ...] = ()) -> Result:
    return Result(name="a case", task="detect", kinds=kinds, findings=list(findings), ended="completed")


def test_the_last_line_and_the_exit_status() -> None:
    named = result(("bad_init", "warning", 0), ("stalled", "info", 9), kinds=("bad_init", "dead_layer"))
    other = result(("lr_too_high", "error", 0), ("bad_init", "warning", 0), kinds=("bad_init",))
    nothing = result(kinds=("bad_init",))
    calm, false = result(("dead_layer", "info", 60), ("stalled", "warning", 90)), result(("stalled", "error", 9))
    assert score([named] * 19 + [other], [calm]) == ("19/20 faults named first, 0 false errors in 1 healthy runs", 0)
    assert score([named] * 18 + [other], [calm])[1] == 1
    assert score([named] * 18 + [nothing], [calm])[1] == 1
    assert score([named] * 20, [calm, false]) == ("20/20 faults named first, 1 false errors in 2 healthy runs", 1)


def test_a_trouble_is_noticed_in_time_or_not() -> None:
    late = Notice(trouble="blowup", began=20, lost=11)
    assert (late.in_time, str(late)) == (False, "blowup +11 (limit 10) LATE")
    assert Notice(trouble="blowup", began=20, lost=10).in_time
    assert not Notice(trouble="nonfinite", began=20, lost=1).in_time
    assert Notice(trouble="collapse", began=20, lost=-3).in_time  # foreseen
    assert not Notice(trouble="collapse", began=20, lost=None).in_time
    warned = Notice(trouble="blowup", began=20, lost=18, warned=-2)
    assert (warned.in_time, warned.lost_in_time) == (True, False)
    assert str(warned) == "blowup +18, warned -2 (limit 10)"
    assert not Notice(trouble="blowup", began=20, lost=18, warned=11).in_time


def test_where_a_loss_leaves_is_read_from_the_loss_alone() -> None:
    loss = [200.0] * 12 + [2.1e3, 5e3, 0.1, 0.1, 150.0, 1.9, 0.1]
    steps = pl.DataFrame({"step": range(19), "loss": loss, "skipped": [False] * 19})
    assert (onset(steps, "blowup"), onset(steps, "collapse")) == (12, 17)
    assert (onset(steps.head(16), "collapse"), onset(steps.head(12), "collapse")) == (14, None)
    assert onset(steps.head(12), "blowup") is None


def test_a_wrong_argument_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job=1"]) == 2
    assert capsys.readouterr().err == "unknown argument job; there are out=DIR, only=TEXT,... and jobs=2\n"


def test_a_case_is_data() -> None:
    case = Case(name="a case")
    assert (case.kinds, case.trouble, case.args, case.callbacks) == ((), None, {}, {})
