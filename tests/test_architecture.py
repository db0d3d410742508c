"""The house of docs/design.md, read out of the imports: floors, no cycles, one door to each thing.

The checks take a folder, so that the second half of this file can show each of them failing.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cellplm_tl"

# From the ground up. A file imports from floors below its own, and from files of its own folder.
FLOORS = [
    {"_errors"},
    {"_settings", "_random"},
    {"_genes"},
    {"models"},
    {"_weights"},
    {"_anndata"},
    {"_inference", "_likelihood", "metrics"},
    {"_rotation", "train"},
    {"_stored", "_denoising", "_annotation"},
    {"pp", "tl", "pl"},
    {"__init__"},
]
FLOOR = {unit: level for level, units in enumerate(FLOORS) for unit in units}
NO_SIBLINGS = {"tl"}  # what two tools need goes one floor down

MODELS_MAY_IMPORT = {"torch", "numpy", *sys.stdlib_module_names}
SLOTS = {"X", "layers", "obs", "obs_names", "obsm", "obsp", "raw", "uns", "var", "var_names"} | {
    "varm",
    "varp",
}
# Words that tensors and networks use as well: slots only on what is called or annotated an AnnData.
AMBIGUOUS = {"X", "layers", "raw", "var"}
ANNDATA_NAMES = {"adata", "reference", "query"}


def files(root: Path) -> dict[str, ast.Module]:
    """Parse every file of a package; keys are paths below `root`, like ``"tl/embed.py"``."""
    paths = sorted(root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in paths}


def unit(file: str) -> str:
    """Give what a floor lists: the top folder of a file, else the name of the file."""
    return file.split("/")[0].removesuffix(".py")


def imports(root: Path, file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Give line and target of every import, wherever it stands in the file.

    The target is a file below `root` for the package's own, else a dotted name.
    """
    here = [root.name, *file.removesuffix(".py").split("/")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *parts = name.split(".")
            if top != root.name:
                yield node.lineno, name
                continue
            # The longest part of the dotted name that is a file; the rest are names inside it.
            while parts and not (file_of := _file(root, parts)):
                parts.pop()
            yield node.lineno, file_of if parts else "__init__.py"


def _file(root: Path, parts: list[str]) -> str | None:
    for candidate in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
        if (root / candidate).is_file():
            return candidate
    return None


def breaches_of_floors(root: Path) -> Iterator[str]:
    for file, tree in files(root).items():
        if unit(file) not in FLOOR:
            yield f"{file}: is on no floor; add it to FLOORS and to docs/design.md"
            continue
        for line, target in imports(root, file, tree):
            if not target.endswith(".py"):
                continue
            same_folder = unit(target) == unit(file)
            if same_folder and unit(file) in NO_SIBLINGS and not file.endswith("__init__.py"):
                yield f"{file}:{line}: imports its sibling {target}"
            elif not same_folder and FLOOR.get(unit(target), len(FLOORS)) >= FLOOR[unit(file)]:
                yield f"{file}:{line}: imports {target}, which is not on a floor below"


def breaches_of_order(root: Path) -> Iterator[str]:
    graph = {
        file: {target for _, target in imports(root, file, tree) if target.endswith(".py")}
        for file, tree in files(root).items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "cycle: " + " → ".join(reversed(error.args[1]))


def breaches_of_models(root: Path) -> Iterator[str]:
    for file, tree in files(root).items():
        if unit(file) != "models":
            continue
        for line, target in imports(root, file, tree):
            own = target.endswith(".py") and unit(target) == "models"
            if not own and target.split(".")[0] not in MODELS_MAY_IMPORT:
                yield f"{file}:{line}: models/ imports {target}"


def breaches_of_weights(root: Path) -> Iterator[str]:
    """Only `_weights.py` opens files of weights."""
    for file, tree in files(root).items():
        if unit(file) == "_weights":
            continue
        for line, target in imports(root, file, tree):
            if target.split(".")[0] == "safetensors" or target in {"torch.load", "torch.jit.load"}:
                yield f"{file}:{line}: imports {target}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "torch.load",
                "torch.jit.load",
            }:
                yield f"{file}:{node.lineno}: uses {ast.unparse(node)}"


def breaches_of_slots(root: Path) -> Iterator[str]:
    """Only `_anndata` touches the slots of an AnnData; `pl/` may read them.

    An object that a file makes for itself, to ask scanpy something, is nobody else's.
    """
    for file, tree in files(root).items():
        if unit(file) in {"_anndata", "models"}:  # models/ cannot have an AnnData: see its imports
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        adatas = ANNDATA_NAMES | {
            argument.arg
            for argument in ast.walk(tree)
            if isinstance(argument, ast.arg)
            and argument.annotation is not None
            and "AnnData" in ast.unparse(argument.annotation)
        }
        own = {
            ast.unparse(assignment.targets[0])
            for assignment in ast.walk(tree)
            if isinstance(assignment, ast.Assign)
            and isinstance(assignment.value, ast.Call)
            and ast.unparse(assignment.value.func).split(".")[-1] == "AnnData"
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and node.attr in SLOTS):
                continue
            if node.attr in AMBIGUOUS and ast.unparse(node.value) not in adatas:
                continue
            if ast.unparse(node.value) in own:
                continue
            # adata.obsm[...] = … writes, and so do .update(…) or del; reading is a Load elsewhere.
            outer = parents.get(node)
            stores = not isinstance(node.ctx, ast.Load) or (
                isinstance(outer, ast.Subscript) and not isinstance(outer.ctx, ast.Load)
            )
            if unit(file) == "pl" and not stores:
                continue
            yield f"{file}:{node.lineno}: {'writes' if stores else 'reads'} {ast.unparse(node)}"


CHECKS = [
    breaches_of_floors,
    breaches_of_order,
    breaches_of_models,
    breaches_of_weights,
    breaches_of_slots,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_keeps_to_the_plan(check: Callable[[Path], Iterator[str]]):
    assert list(check(PACKAGE)) == []


def test_there_is_something_to_check():
    trees = files(PACKAGE)
    assert {"__init__.py", "_errors.py", "_settings.py"} <= set(trees)
    found = {target for _, target in imports(PACKAGE, "_settings.py", trees["_settings.py"])}
    assert {"_errors.py", "pooch", "torch"} <= found  # at the top, and inside functions


# Each check can fail: one small house with one fault.

HOUSE = {
    "__init__.py": "from cellplm_tl import pl, tl\nfrom cellplm_tl._settings import settings",
    "_errors.py": "",
    "_settings.py": "from cellplm_tl._errors import OptionError",
    "_weights.py": "import safetensors.torch\nimport torch\ntorch.load('x')",
    "_anndata.py": "def write(adata, key):\n    adata.obsm[key] = adata.X",
    "metrics/clustering.py": "def f(x):\n    a = ad.AnnData(x)\n    a.obsm['x'] = a.obs['b']",
    "_inference.py": "def run(network):\n    return network.layers[0], network.x.var(0)",
    "models/__init__.py": "from .network import CellPLM",
    "models/config.py": "from __future__ import annotations\nimport dataclasses",
    "models/network.py": "import numpy as np\nimport torch.nn\nfrom .config import Config",
    "pl/__init__.py": "",
    "pl/attention.py": "def attention(adata):\n    return adata.obsp['a']",
    "tl/__init__.py": "from .embed import embed\nfrom . import denoise",
    "tl/embed.py": "from .._anndata import write",
    "tl/denoise.py": "from cellplm_tl import _inference",
}


def build(root: Path, **changed: str) -> Path:
    package = root / "cellplm_tl"
    for file, text in (HOUSE | changed).items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    return package


@pytest.mark.parametrize("check", CHECKS)
def test_a_good_house_passes(tmp_path, check):
    assert list(check(build(tmp_path))) == []


@pytest.mark.parametrize(
    ("check", "file", "text", "breach"),
    [
        (breaches_of_floors, "_errors.py", "import cellplm_tl._settings", "imports _settings.py"),
        (breaches_of_floors, "_weights.py", "from . import _anndata", "imports _anndata.py"),
        (breaches_of_floors, "_anndata.py", "from .tl.embed import embed", "imports tl/embed.py"),
        (breaches_of_floors, "_anndata.py", "def f():\n from .tl import embed", "tl/embed.py"),
        (breaches_of_floors, "models/network.py", "from .. import _errors, _weights", "_weights"),
        (breaches_of_floors, "tl/embed.py", "import cellplm_tl as cp", "imports __init__.py"),
        (breaches_of_floors, "tl/embed.py", "from .. import settings", "imports __init__.py"),
        (breaches_of_floors, "tl/embed.py", "from .denoise import x", "sibling tl/denoise.py"),
        (breaches_of_floors, "tl/embed.py", "from cellplm_tl.tl import denoise", "tl/denoise.py"),
        (breaches_of_floors, "tl/embed.py", "from . import x", "sibling tl/__init__.py"),
        (breaches_of_floors, "pl/attention.py", "from cellplm_tl.tl import embed", "tl/embed.py"),
        (breaches_of_floors, "utils.py", "", "utils.py: is on no floor"),
        (breaches_of_order, "models/config.py", "from .network import CellPLM", "cycle: models/"),
        (breaches_of_order, "models/config.py", "from . import network", "cycle: models/"),
        (breaches_of_order, "models/config.py", "from cellplm_tl.models import X", "cycle: models"),
        (breaches_of_models, "models/config.py", "import anndata", "models/ imports anndata"),
        (breaches_of_models, "models/config.py", "from scipy.sparse import x", "imports scipy"),
        (breaches_of_models, "models/config.py", "from .._settings import x", "_settings.py"),
        (breaches_of_weights, "tl/embed.py", "import torch\nx = torch.load('x')", ":2: uses torch"),
        (breaches_of_weights, "tl/embed.py", "from torch import load", "imports torch.load"),
        (breaches_of_weights, "tl/embed.py", "from safetensors.torch import a", "safetensors"),
        (breaches_of_slots, "tl/embed.py", "adata.obsm['x'] = 1", "writes adata.obsm"),
        (breaches_of_slots, "tl/embed.py", "del adata.uns['x']", "writes adata.uns"),
        (breaches_of_slots, "tl/embed.py", "x = whatever.uns", "reads whatever.uns"),
        (breaches_of_slots, "tl/embed.py", "x = adata.X", "reads adata.X"),
        (breaches_of_slots, "tl/embed.py", "def f(a: AnnData):\n    a.var", ":2: reads a.var"),
        (breaches_of_slots, "tl/embed.py", "reference.layers['x']", "reads reference.layers"),
        (breaches_of_slots, "pl/attention.py", "adata.uns['x'] = 1", "writes adata.uns"),
        (breaches_of_slots, "pl/attention.py", "adata.X = 1", "writes adata.X"),
    ],
)
def test_one_fault_is_found(tmp_path, check, file, text, breach):
    found = list(check(build(tmp_path, **{file: text})))
    assert len(found) == 1
    assert breach in found[0]
