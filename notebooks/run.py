"""Runs the notebooks in order and keeps what they show: `python notebooks/run.py`, or `make notebooks`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NAMES = (
    "01-Setup_and_Data.ipynb",
    "02-SFT_Baseline.ipynb",
    "03-DPO_Training.ipynb",
    "04-Evaluation_and_Compare.ipynb",
)


def execute(file: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in its own folder; an error in a cell raises."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a model this small only waits for threads
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(file.parent)}},
    ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of whoever ran it
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def main() -> None:
    for name in NAMES:
        began = time.monotonic()
        nbformat.write(execute(HERE / name), HERE / name)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
