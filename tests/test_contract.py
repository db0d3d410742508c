"""What everything public has in common: signatures, docstrings, a place in the docs.

Functions are found by introspection: a tool that is added as a file is checked from then on.
What the functions do to an AnnData is in test_contract_anndata.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpydoc.docscrape import NumpyDocString

import cellplm_tl as cp

DOCS = Path(__file__).parents[1] / "docs"

MODULES = [name for name in cp.__all__ if inspect.ismodule(getattr(cp, name))]
PUBLIC: dict[str, Any] = {
    **{
        f"{m}.{name}": getattr(getattr(cp, m), name)
        for m in MODULES
        for name in getattr(cp, m).__all__
    },
    **{name: getattr(cp, name) for name in cp.__all__ if inspect.isclass(getattr(cp, name))},
    "settings": type(cp.settings),
}
METHODS = {
    f"settings.{name}": method
    for name, method in vars(type(cp.settings)).items()
    if inspect.isfunction(method) and not name.startswith("_")
}
FUNCTIONS_OF_ADATA = [name for name in PUBLIC if name.startswith(("tl.", "pp."))]

# Data that may be given by position, after `adata`.
DATA = {"reference", "perturbation", "perturbations"}
# Words that mean the same everywhere, in their order, with their default (``str``: any text).
WORDS = {
    "model": "mini",
    "layer": None,
    "gene_key": None,
    "batch_key": None,
    "spatial_key": "spatial",
    "context": "data",
    "key_added": str,
    "device": None,
    "random_state": 0,
    "copy": False,
}
EVERY_TOOL_HAS = ("model", "gene_key")
EVERY_TOOL_THAT_READS_COUNTS_HAS = ("device", "random_state")  # it runs a network


# Signatures


def breaches_of_grammar(function: Callable[..., Any], *, is_tool: bool) -> list[str]:
    """List what is wrong with the signature of a function of `tl` (a tool) or `pp`."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    names = [p.name for p in parameters]
    found = []
    if names[:1] != ["adata"] or parameters[0].default is not inspect.Parameter.empty:
        found.append("does not begin with adata, without a default")
    for p in parameters[1:]:
        if p.kind is not p.KEYWORD_ONLY and p.name not in DATA:
            found.append(f"{p.name} is not keyword-only")
        usual = WORDS.get(p.name, p.default)
        if p.default != usual and not (usual is str and isinstance(p.default, str)):
            found.append(f"{p.name} is not {usual!r} by default")
    found += [f"{p.name} has no type" for p in parameters if p.annotation is p.empty]
    words = [name for name in names if name in WORDS]
    if words != sorted(words, key=list(WORDS).index):
        found.append(f"not the usual order: {', '.join(words)}")
    if names[len(names) - len(words) :] != words:
        found.append("an option of its own stands after the usual words")
    expected = "AnnData | None" if "copy" in names else "AnnData"
    if signature.return_annotation != expected:
        found.append(f"returns {signature.return_annotation}, not {expected}")
    if is_tool:
        needed = EVERY_TOOL_HAS
        if "layer" in names:
            needed += EVERY_TOOL_THAT_READS_COUNTS_HAS
        found += [f"has no {word}" for word in needed if word not in names]
        if ("copy" in names) != ("key_added" in names):
            found.append("has one of key_added and copy: both are for slots that are written")
    return found


@pytest.mark.parametrize("name", FUNCTIONS_OF_ADATA)
def test_signature_follows_the_grammar(name):
    assert breaches_of_grammar(PUBLIC[name], is_tool=name.startswith("tl.")) == []


GOOD_SIGNATURE = (
    'adata: A, reference: A = 1, *, own: int = 1, model: str = "mini", layer: N = None, '
    'gene_key: N = None, key_added: str = "x", device: N = None, random_state: int = 0, '
    "copy: bool = False"
)


@pytest.mark.parametrize(
    ("old", "new", "breach"),
    [
        ("adata: A,", "data: A,", "does not begin with adata"),
        ("adata: A,", "adata: A = 1,", "does not begin with adata"),
        ("reference: A", "other: A", "other is not keyword-only"),
        ("= False", "= False, **more: A", "more is not keyword-only"),
        ("own: int", "own", "own has no type"),
        ('"mini"', '"large"', "model is not 'mini' by default"),
        ('"x"', "None", "key_added is not <class 'str'> by default"),
        ("own: int = 1", "batch_key: N = None", "not the usual order: batch_key, model"),
        ("= False", "= False, own_2: int = 1", "an option of its own stands after"),
        ("gene_key: N = None, ", "", "has no gene_key"),
        ("random_state: int = 0, ", "", "has no random_state"),
        (", copy: bool = False", "", "returns AnnData | None, not AnnData"),
        (", copy: bool = False", "", "has one of key_added and copy"),
    ],
)
def test_a_breach_of_the_grammar_is_found(old, new, breach):
    def define(parameters: str) -> Callable[..., Any]:
        namespace: dict[str, Any] = {}
        source = f"from __future__ import annotations\ndef f({parameters}) -> AnnData | None: ..."
        exec(source, namespace)
        return namespace["f"]

    assert breaches_of_grammar(define(GOOD_SIGNATURE), is_tool=True) == []
    found = breaches_of_grammar(define(GOOD_SIGNATURE.replace(old, new)), is_tool=True)
    assert any(breach in one for one in found)


# Docstrings


def breaches_of_docstring(obj: Any, *, sections: tuple[str, ...] = ()) -> list[str]:
    """List what is wrong with the docstring of a function or class, read as numpydoc."""
    if not obj.__doc__:
        return ["has no docstring"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doc = NumpyDocString(inspect.cleandoc(obj.__doc__))
    found = [str(warning.message).splitlines()[0] for warning in caught]
    if len(doc["Summary"]) != 1 or not doc["Summary"][0].endswith("."):
        found.append("does not begin with one line that ends with a full stop")
    found += [f"has no section {section}" for section in sections if not doc[section]]
    if not any(line.startswith(">>>") for line in doc["Examples"]):
        found.append("has no example that runs")

    described = {
        name.strip(" *"): entry for entry in doc["Parameters"] for name in entry.name.split(",")
    }
    parameters = _parameters(obj)
    if list(described) != [p.name for p in parameters]:
        names = ", ".join(p.name for p in parameters)
        found.append(f"describes ({', '.join(described)}), not the parameters ({names})")
        return found
    for p in parameters:
        text = described[p.name].type
        if not text or not "".join(described[p.name].desc).strip():
            found.append(f"{p.name} lacks a type or a description")
        elif p.default is p.empty or inspect.isclass(obj):  # of fields the signature says it
            continue
        elif stated := re.search(r"default:? (.+)$", text):
            if ast.literal_eval(stated[1].strip("`")) != p.default:
                found.append(f"{p.name} is {p.default!r} by default, not {stated[1]}")
        elif "optional" not in text:
            found.append(f"{p.name} has a default; its type says neither it nor 'optional'")
    return found


def _parameters(obj: Any) -> list[inspect.Parameter]:
    """Give what is to be described; of a class nothing unless users make objects of it."""
    if inspect.isclass(obj) and not (
        dataclasses.is_dataclass(obj) or hasattr(obj, "_fields") or "__init__" in vars(obj)
    ):
        return []
    return [p for p in inspect.signature(obj).parameters.values() if p.name != "self"]


def _sections(name: str, obj: Any) -> tuple[str, ...]:
    if inspect.isclass(obj):
        return ()
    if name.startswith("tl."):
        return ("Returns", "Raises", "Notes")
    if name.startswith("pp."):
        return ("Returns", "Raises")
    return () if inspect.signature(obj).return_annotation in (None, "None") else ("Returns",)


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_docstring_is_complete(name):
    obj = (PUBLIC | METHODS)[name]
    assert breaches_of_docstring(obj, sections=_sections(name, obj)) == []


@pytest.mark.parametrize(
    "name", [name for name, obj in PUBLIC.items() if inspect.isclass(obj) and name in PUBLIC]
)
def test_public_members_of_classes_say_what_they_do(name):
    members = {
        attribute: member
        for attribute, member in vars(PUBLIC[name]).items()
        if not attribute.startswith("_") and (callable(member) or isinstance(member, property))
    }
    assert [attribute for attribute, member in members.items() if not member.__doc__] == []


GOOD_DOCSTRING = """Do it well.

    Parameters
    ----------
    adata : AnnData
        Cells.
    n, m : int, default 3
        Numbers.
    layer : str, optional
        A slot.

    Returns
    -------
    int
        It.

    Examples
    --------
    >>> 1 + 1
    2
    """


@pytest.mark.parametrize(
    ("old", "new", "breach"),
    [
        (GOOD_DOCSTRING, "", "has no docstring"),
        ("Do it well.", "Do it well", "does not begin with one line"),
        ("Do it well.", "Do it\n    well.", "does not begin with one line"),
        ("Returns", "Notes", "has no section Returns"),
        ("-------\n    int", "---\n    int", "wrong underline length"),
        (">>> 1 + 1", "1 + 1", "has no example"),
        ("n, m", "m, n", "describes (adata, m, n, layer), not the parameters (adata, n, m, layer)"),
        ("n, m", "n", "describes (adata, n, layer), not"),
        ("layer : str, optional", "layer", "layer lacks a type or a description"),
        ("    A slot.", "", "layer lacks a type or a description"),
        ("default 3", "default 4", "n is 3 by default, not 4"),
        ("int, default 3", "int", "n has a default; its type says neither"),
    ],
)
def test_a_breach_of_the_docstring_is_found(old, new, breach):
    def function(adata, n=3, m=3, layer=None) -> int: ...

    function.__doc__ = GOOD_DOCSTRING
    assert breaches_of_docstring(function, sections=("Returns",)) == []
    function.__doc__ = GOOD_DOCSTRING.replace(old, new)
    found = breaches_of_docstring(function, sections=("Returns",))
    assert any(breach in one for one in found)


# Places


@pytest.mark.parametrize("folder", ["tl", "pp"])
def test_each_file_holds_one_public_function_named_after_it(folder):
    module = getattr(cp, folder)
    stems = [m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_")]
    assert sorted(module.__all__) == stems, f"export it in cellplm_tl/{folder}/__init__.py"
    for stem in stems:
        assert inspect.isfunction(getattr(module, stem))
        assert getattr(module, stem).__module__ == f"cellplm_tl.{folder}.{stem}"


@pytest.mark.parametrize("module", [cp, *(getattr(cp, name) for name in MODULES)])
def test_the_face_shows_what_it_exports_and_nothing_else(module):
    seen = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    exported = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert seen == exported - {"__version__"}


@pytest.mark.parametrize("page", [*MODULES, "settings"])
def test_every_public_name_is_listed_in_the_api_pages(page):
    text = (DOCS / "api" / f"{page}.md").read_text()
    listed = re.findall(
        r"^(?: +|.*autodata:: )([a-z]+\.\w+|settings|CellPLM\w+)$", text, re.MULTILINE
    )
    there = [name for name in PUBLIC if name.startswith(f"{page}.")]
    if page == "settings":
        there = [name for name in PUBLIC if "." not in name]
    assert sorted(listed) == sorted(there), f"list what is missing in docs/api/{page}.md"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("tl.")])
def test_every_tool_has_a_method_page(name):
    assert (DOCS / "methods" / f"{name.removeprefix('tl.')}.md").is_file()
