"""Every quirk as a test of its own, and that their judge can fail."""

from pathlib import Path

import pytest

from .quirks import QUIRKS, Quirk, annotation, outcome


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: quirk.name)
def test_it_is_taken_and_right_or_refused_in_one_line(quirk: Quirk, tmp_path: Path) -> None:
    taken, wrong = outcome(quirk, tmp_path / "set")
    assert not wrong
    assert taken is not bool(quirk.refused)


def test_names_are_told_apart() -> None:
    assert len({quirk.name for quirk in QUIRKS}) == len(QUIRKS)


@pytest.mark.parametrize(
    ("quirk", "wrong"),
    [
        (Quirk("taken, and should not be", annotation(), refused=("annotation 11",)), "refused with []"),
        (Quirk("refused, and should not be", annotation(bbox=[])), "refused with ["),
        (Quirk("named otherwise", annotation(bbox=[]), refused=("annotation 12",)), "not with one line that says"),
        (Quirk("counted wrong", annotation(iscrowd=1)), "used 1, not used {'crowd': 1}; not 2"),
        (
            Quirk("writes", lambda c, f: (f / "b.jpg").write_bytes((f / "a.png").read_bytes()), used=1),
            "used 2",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Quirk) else "",
)
def test_its_judge_can_say_no(quirk: Quirk, wrong: str, tmp_path: Path) -> None:
    (line,) = outcome(quirk, tmp_path / "set")[1]
    assert wrong in line
