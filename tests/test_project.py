"""The files around the package agree with each other and with the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import cellplm_tl as cp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(text) for text in PROJECT["dependencies"]]
ALL = DECLARED + [Requirement(text) for extra in EXTRAS.values() for text in extra]
MODULES = {"scikit-learn": "sklearn"}  # where the names of project and module differ


def imported_by_the_package() -> set[str]:
    """Give the top names of what the package imports from elsewhere, at whatever place."""
    found = set()
    for path in (ROOT / "cellplm_tl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"cellplm_tl"}


def test_what_the_package_imports_is_declared():
    optional = {"dask", "zarr"}  # asked for only where an AnnData of the user is made of them
    assert imported_by_the_package() - optional <= {MODULES.get(r.name, r.name) for r in DECLARED}


def test_what_is_tested_with_lies_within_what_is_allowed():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert "torch" in {pin.name for pin in pins}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        for requirement in ALL:
            if requirement.name == pin.name:
                assert specifier.version in requirement.specifier, pin


def test_the_version_stands_in_one_place_and_others_follow():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {cp.__version__}\n" in citation
    release = cp.__version__.split(".dev")[0]
    heading = "Unreleased" if ".dev" in cp.__version__ else release
    assert f"\n## [{heading}]" in (ROOT / "CHANGELOG.md").read_text()


def test_dev_says_what_it_can_do_and_the_readme_says_the_same():
    usage = subprocess.run(
        [ROOT / "dev", "help"], capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"^\./dev (\w+)", usage, re.MULTILINE)
    assert commands == ["demo", "test", "lint", "docs", "bench", "run"]
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| `\./dev (\w+)", readme, re.MULTILINE) == commands
    script = (ROOT / "dev").read_text()
    for command in commands:
        assert f"\n    {command})\n" in script


def test_dev_installs_extras_that_exist():
    extras = re.findall(r"^\s+setup (\w+)$", (ROOT / "dev").read_text(), re.MULTILINE)
    assert len(extras) >= 6
    assert set(extras) <= set(EXTRAS)


@pytest.mark.parametrize("arguments", [["tset"], ["bench", "no_such"]])
def test_dev_refuses_what_it_does_not_know(arguments):
    done = subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "./dev test" in done.stdout or "no benchmark 'no_such'" in done.stderr
