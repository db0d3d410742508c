from __future__ import annotations

import inspect
import pickle

import anndata as ad
import numpy as np
import pytest

import cellplm_tl as cp
from cellplm_tl import _errors
from cellplm_tl._errors import InputError, OptionError, check_is_anndata, check_option

CLASSES = [value for _, value in inspect.getmembers(_errors, inspect.isclass)]
ERRORS = [cls for cls in CLASSES if issubclass(cls, cp.CellPLMError)]
WARNINGS = [cls for cls in CLASSES if issubclass(cls, Warning)]


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_read_as_the_sentence_they_were_given(cls):
    # KeyError's own str() is the repr, with quotes around it.
    assert str(cls("obs has no column 'donor'.")) == "obs has no column 'donor'."
    assert str(pickle.loads(pickle.dumps(cls("a sentence.")))) == "a sentence."


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InputError", ValueError),
        ("CountsError", ValueError),
        ("GenesError", ValueError),
        ("ContextError", ValueError),
        ("SlotError", KeyError),
        ("OptionError", ValueError),
        ("WeightsError", ValueError),
        ("ModelNotFoundError", FileNotFoundError),
        ("TrainingError", RuntimeError),
    ],
)
def test_errors_are_what_python_users_catch(name, builtin):
    with pytest.raises(builtin):
        raise getattr(_errors, name)("a sentence.")


def test_the_tree_of_the_module_docstring_is_the_tree_of_the_classes():
    """Read the drawing line by line: depth is parentage."""
    drawn, line_of_descent = {}, {}
    for line in _errors.__doc__.splitlines():
        name = line.strip(" │├└─").split(" ")[0]
        if name.endswith(("Error", "Warning", "Exception")) and name.isidentifier():
            depth = len(line) - len(line.lstrip(" │├└─"))
            line_of_descent[depth] = name
            drawn[name] = (
                max((d, n) for d, n in line_of_descent.items() if d < depth)[1]
                if (depth > min(line_of_descent))
                else None
            )
            line_of_descent = {d: n for d, n in line_of_descent.items() if d <= depth}
    classes = {cls.__name__: cls.__bases__[0].__name__ for cls in ERRORS + WARNINGS}
    assert {name: parent for name, parent in drawn.items() if parent} == classes


def test_check_option_lists_what_is_allowed():
    check_option("method", "auto", ("auto", "head"))
    with pytest.raises(OptionError, match="^method must be one of 'auto', 'head'; got 'haed'.$"):
        check_option("method", "haed", ("auto", "head"))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.array([1, 0])])
def test_check_option_takes_no_lookalikes(value):
    with pytest.raises(OptionError):
        check_option("verbosity", value, (0, 1))


def test_check_is_anndata_says_what_was_given_and_what_to_do():
    check_is_anndata(ad.AnnData(np.zeros((2, 3))))
    with pytest.raises(
        InputError, match=r"^reference must be an AnnData object; got ndarray\. Make"
    ):
        check_is_anndata(np.zeros((2, 3)), "reference")
