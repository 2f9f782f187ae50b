"""The long run on few steps: what it reports is what the run left."""

from pathlib import Path

import pytest

from trust.endurance import endure

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]


def test_what_is_endured_is_what_was_recorded(tmp_path: Path) -> None:
    result = endure(tmp_path, steps=100)
    assert (result["steps"], result["records"], result["rollbacks"]) == (100, 100, 0)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "run/gradstab").rglob("*") if path.is_file())
    assert result["bytes_per_step"] == pytest.approx(on_disk / 100, abs=0.1)
    assert 0 < result["rss_mib"][0] <= result["rss_mib"][1] + 50
    assert (tmp_path / "report/report.html").stat().st_size == result["report_bytes"]
