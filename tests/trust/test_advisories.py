"""What is made of pip-audit's answer; the answers are written by hand in its published format."""

from .advisories import verdict

CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.15.0)"}
BAD = {
    "name": "jinja2",
    "version": "2.10",
    "vulns": [
        {"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"], "aliases": ["CVE-2019-10906"], "description": "..."},
        {"id": "GHSA-none", "fix_versions": [], "aliases": [], "description": "..."},
    ],
}


def test_a_vulnerability_is_named_with_what_mends_it() -> None:
    lines, bad = verdict([CLEAN, BAD])
    assert bad == 1
    assert lines == [
        "jinja2 2.10: PYSEC-2019-217, mended in 2.10.1",
        "jinja2 2.10: GHSA-none, mended in no release",
        "2 packages looked up, 1 with known vulnerabilities",
    ]


def test_what_could_not_be_looked_up_is_not_called_clean() -> None:
    assert verdict([SKIPPED]) == (
        ["0 packages looked up, 0 with known vulnerabilities; 1 could not be looked up from here"],
        0,
    )
    assert verdict([CLEAN, SKIPPED])[0] == [
        "1 packages looked up, 0 with known vulnerabilities; 1 could not be looked up from here, torch first"
    ]
