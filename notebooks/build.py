"""Execute the notebooks of this folder in place on full settings, and keep what they show small: `make notebooks`."""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
MOST_BYTES = 500_000  # of a notebook: more, and a code-hosting site is slow to show it


def build(path: Path) -> None:
    """Execute one notebook, from top to bottom in a new process, and write it with its outputs.

    Raises:
        CellExecutionError: A cell failed; the file is left as it was.
        ValueError: It shows a path of this machine, or is too large to be looked at.
    """
    os.environ.pop("GRADSTAB_NOTEBOOK", None)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": FOLDER}}).execute()
    for output in [output for cell in notebook.cells for output in cell.get("outputs", [])]:
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = _fewer_colours(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}  # without the version of Python that was at hand
    text = nbformat.writes(notebook) + "\n"
    for place in (str(Path.home()), str(FOLDER.parent), tempfile.gettempdir()):
        if f"{place}{os.sep}" in text:
            raise ValueError(
                f"{path.name} shows a path of this machine, in {place}; print names relative to its folder"
            )
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path.name} has {len(text):,} bytes, at most {MOST_BYTES:,}; show less")
    path.write_text(text, encoding="utf-8")


def _fewer_colours(encoded: str) -> str:
    """A PNG of a third of the size: 256 colours are enough for a chart, if they are chosen so that none is far off."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    small = io.BytesIO()
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for notebook in sorted(FOLDER.glob("*.ipynb")) if len(sys.argv) == 1 else map(Path, sys.argv[1:]):
        print(notebook.name, flush=True)
        build(notebook)
