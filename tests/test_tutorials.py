"""The tutorials are stored as they ran, whole and in order, and speak of what the package has.

Executing them takes minutes: scripts/run_tutorials.py does.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import cellplm_tl as cp

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|work|usr)/|ipykernel_\d|site-packages")
LARGEST = 1_500_000  # bytes, pictures included


def code_cells(name: str) -> list[dict]:
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def names_of(tree: ast.AST, package: str) -> set[str]:
    """Give the dotted names that begin with `package`, such as "tl.annotate"."""
    found = set()
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == package:
            found.add(".".join(reversed(parts)))
    return found


@pytest.fixture(params=["annotate", "denoise"])
def name(request):
    return request.param


def test_there_is_one_for_each_and_the_page_lists_them():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {"annotate", "denoise"}
    page = (FOLDER / "index.md").read_text()
    assert re.findall(r"^(\w+)$", page.split("```{toctree}")[1], re.MULTILINE) == [
        "annotate",
        "denoise",
    ]


def test_every_cell_was_executed_in_one_run_without_an_error(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_what_is_called_exists(name):
    source = "\n".join("".join(cell["source"]) for cell in code_cells(name))
    names = names_of(ast.parse(source), "cp")
    assert f"tl.{name}" in names
    for dotted in names:
        part = cp
        for step in dotted.split("."):
            assert hasattr(part, step), f"cp.{dotted} is used in {name}.ipynb"
            part = getattr(part, step)


def test_no_output_is_of_a_machine_and_the_file_is_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    for cell in code_cells(name):
        for output in cell["outputs"]:
            shown = output.get("data", {}).get("text/plain", []) + output.get("text", [])
            assert not OF_A_MACHINE.search("".join(shown))


def test_the_documentation_shows_them_as_they_are_stored():
    conf = (FOLDER.parent / "conf.py").read_text()
    assert '\nnb_execution_mode = "off"' in conf
    assert "\ntutorials/index\n" in (FOLDER.parent / "index.md").read_text()
