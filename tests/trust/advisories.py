"""Known vulnerabilities of the versions in `constraints.txt`, by pip-audit, which stands beside .venv: `make audit`.

    .audit/bin/python tests/trust/advisories.py

Exit status 1 if there is one. Where no advisories can be reached (no network, or a registry without them) that is said,
with how many packages were not looked up, and is no failure: it says nothing about them either way.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
LIMIT_S = 300


def verdict(dependencies: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Lines to print, and how many packages have a vulnerability, of pip-audit's own list."""
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    bad = [each for each in dependencies if each.get("vulns")]
    lines = [
        f"{each['name']} {each['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no release'}"
        for each in bad
        for found in each["vulns"]
    ]
    lines.append(f"{len(dependencies) - len(skipped)} packages looked up, {len(bad)} with known vulnerabilities")
    if skipped:
        more = f", {skipped[0]} first" if len(skipped) < len(dependencies) else ""
        lines[-1] += f"; {len(skipped)} could not be looked up from here{more}"
    return lines, len(bad)


def main() -> int:
    """Ask, print, judge."""
    command = [str(Path(sys.executable).with_name("pip-audit")), "-r", str(CONSTRAINTS), "-f", "json"]
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        dependencies = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"nothing was looked up: no answer within {LIMIT_S} s")
        return 0
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        print(f"nothing was looked up: {last}")
        return 0
    lines, bad = verdict(dependencies)
    print(*lines, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
