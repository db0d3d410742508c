"""Exceptions and warnings of the package, and the small checks that raise them.

::

    Exception
      └─ CellPLMError
           ├─ InputError            (also ValueError)
           │    ├─ CountsError
           │    ├─ GenesError
           │    └─ ContextError
           ├─ SlotError             (also KeyError)
           ├─ OptionError           (also ValueError)
           ├─ ModelError
           │    ├─ WeightsError       (also ValueError)
           │    └─ ModelNotFoundError (also FileNotFoundError)
           └─ TrainingError         (also RuntimeError)

    UserWarning
      └─ CellPLMWarning
           ├─ GenesWarning
           ├─ CountsWarning
           ├─ ContextWarning
           ├─ BaselineWarning
           └─ SmoothingWarning

Every message says what was found, what was expected and what to do next, with names and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class CellPLMError(Exception):
    """Base of every error that the package raises on purpose.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> try:
    ...     cp.settings.device = "abacus"
    ... except cp.CellPLMError as error:
    ...     print(type(error).__name__)
    OptionError
    """


class InputError(CellPLMError, ValueError):
    """The data cannot be used as they are."""


class CountsError(InputError):
    """The matrix holds no counts, and none can be recovered: scaled, negative, NaN or infinite."""


class GenesError(InputError):
    """Too few genes of the data are known to the model."""


class ContextError(InputError):
    """Contexts or coordinates cannot be read from the data."""


class SlotError(CellPLMError, KeyError):
    """A slot that was named does not exist, or the key to write is that of an input."""

    # KeyError prints the repr of its argument; ours is a sentence, made to be read.
    __str__ = Exception.__str__


class OptionError(CellPLMError, ValueError):
    """A parameter or a setting has a value that is not allowed."""


class ModelError(CellPLMError):
    """A model cannot be used for what it was asked for."""


class WeightsError(ModelError, ValueError):
    """A file of weights is damaged, or does not fit the network that its config describes."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model of that name or path is there, and it cannot be fetched."""


class TrainingError(CellPLMError, RuntimeError):
    """Training cannot go on; the last good state has been kept."""


class CellPLMWarning(UserWarning):
    """Base of every warning of the package: a result is given, and one should know about it.

    Examples
    --------
    >>> import warnings
    >>> import cellplm_tl as cp
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", cp.CellPLMWarning)
    ...     # calls in here are quiet
    """


class GenesWarning(CellPLMWarning):
    """Part of the genes, or of the counts, could not be matched to the model."""


class CountsWarning(CellPLMWarning):
    """Counts were recovered from transformed values, and something was lost on the way."""


class ContextWarning(CellPLMWarning):
    """A context is of a size or a kind that the embedding of its cells suffers from."""


class BaselineWarning(CellPLMWarning):
    """A simple baseline does better on held-out material than what was asked for."""


class SmoothingWarning(CellPLMWarning):
    """Denoising has put more correlation between genes than held-out counts show."""


def check_option(name: str, value: Any, options: Iterable[Any]) -> None:
    """Raise :class:`OptionError` unless `value` is one of `options`.

    Equality is not enough: ``True`` is no ``1`` and ``1.0`` is none either.

    Parameters
    ----------
    name : str
        Name of the parameter, as the user writes it.
    value : object
        What was given.
    options : iterable
        The values that are allowed, in the order in which they are to be listed.
    """
    options = list(options)
    if not any(type(value) is type(option) and value == option for option in options):
        raise OptionError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}.")


def check_is_anndata(value: Any, name: str = "adata") -> None:
    """Raise :class:`InputError` unless `value` is an :class:`~anndata.AnnData`.

    Parameters
    ----------
    value : object
        What was given.
    name : str, default "adata"
        Name of the parameter, as the user writes it.
    """
    from anndata import AnnData  # here: the exceptions themselves must cost nothing to import

    if not isinstance(value, AnnData):
        raise InputError(
            f"{name} must be an AnnData object; got {type(value).__name__}. "
            "Make one of a cells × genes matrix with anndata.AnnData(X, obs=…, var=…)."
        )
