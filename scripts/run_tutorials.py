"""Execute the tutorials again, and keep what they print and draw.

    ./dev docs  # once: brings what executes notebooks
    .venv/bin/python scripts/run_tutorials.py [annotate] [denoise]

The documentation shows the stored outputs and executes nothing (nb_execution_mode in docs/conf.py):
so run this when a tool has changed, and look at the result before it is committed.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
LIMIT = 300  # seconds, for a whole notebook on two cores
OF_A_KERNEL = re.compile(r"\S*/ipykernel_\d+/\d+\.py:\d+: ")  # where a warning came from


def main() -> None:
    """Execute what was named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="by default all")
    for name in parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        seconds = execute(FOLDER / f"{name}.ipynb")
        print(f"{name}: {seconds:.0f} s")
        if seconds > LIMIT:
            raise SystemExit(f"{name} takes longer than the {LIMIT} s that a tutorial may take.")


def execute(path: Path) -> float:
    """Execute a notebook in place; return the seconds it took. An error leaves the file alone."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, of bars that nobody sees
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_anywhere(output) for output in cell.outputs]
    nbformat.write(notebook, path)
    return seconds


def _anywhere(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out of an output what is of this machine."""
    if output.output_type == "stream":
        output.text = OF_A_KERNEL.sub("", output.text)
    return output


if __name__ == "__main__":
    main()
