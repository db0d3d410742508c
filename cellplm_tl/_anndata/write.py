"""Back to the AnnData: the record of a call, and all its slots at once or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from cellplm_tl._anndata.read import Cells
from cellplm_tl._errors import InputError, SlotError, check_is_anndata
from cellplm_tl._settings import logger

#: Where records are kept: ``uns[RECORDS][key_added]``.
RECORDS = "cellplm"

_MISSING = object()


# -------------------------------------------------------------------------------------- the record


def build_record(
    tool: str,
    *,
    model: Any,
    parameters: Mapping[str, Any],
    seconds: float,
    cells: Cells | None = None,
    device: Any = None,
    precision: str | None = None,
    random_state: Any = None,
    **findings: Any,
) -> dict[str, Any]:
    """Build the record of a call: what was done, with what, on what.

    Parameters
    ----------
    tool
        Name of the function, like ``"embed"``.
    model
        Has a `name` and a `sha256`; None for a tool without a model.
    parameters
        Arguments as called, without the AnnData that the record goes to; those that are None are
        left out.
    seconds
        Time of the call.
    cells
        The cells that were read. A tool that reads genes alone gives `slots_read` and `genes` among
        its findings.
    device, precision
        Where and in which number format the network ran, if it did.
    random_state
        As the user gave it.
    **findings
        What the tool has to say about its result: numbers, texts, arrays, frames, dicts of these.

    Returns
    -------
    dict
        Only what an h5ad file keeps: texts, numbers, booleans, arrays, frames, dicts with keys
        that have no slash. Sequences are arrays.
    """
    record = {
        "tool": tool,
        "package_version": version("cellplm_tl"),
        "model": None if model is None else {"name": model.name, "sha256": model.sha256},
        "parameters": {name: _described(value) for name, value in parameters.items()},
        **({} if cells is None else _read_facts(cells)),
        "device": None if device is None else str(device),
        "precision": precision,
        "random_state": _described(random_state),
        "seconds": float(seconds),
        **findings,
    }
    return _plain(record, "record")


def read_record(adata: Any, tool: str, key_added: str, name: str) -> Mapping[str, Any]:
    """Read the record that a tool left in another AnnData, which the caller calls `name`.

    Raises
    ------
    InputError
        No AnnData.
    SlotError
        There is no record of that tool under that key.
    """
    check_is_anndata(adata, name)
    records = adata.uns.get(RECORDS, {})
    record = records.get(key_added) if isinstance(records, Mapping) else None
    if not isinstance(record, Mapping) or record.get("tool") != tool:
        raise SlotError(
            f"{name}.uns[{RECORDS!r}] has no record of {tool} under {key_added!r}: run "
            f"cp.tl.{tool}({name}, …) first, with the same key_added."
        )
    return record


def cells_frame(adata: AnnData, values: Any, columns: Iterable[Any]) -> pd.DataFrame:
    """Make a frame of ``obsm``: values (cells, columns) under the names of the cells."""
    return pd.DataFrame(values, index=adata.obs_names, columns=[str(name) for name in columns])


def copy_in_memory(adata: AnnData) -> AnnData:
    """Return a copy of an AnnData, backed or not."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def _read_facts(cells: Cells) -> dict[str, Any]:
    """Say what was read: slots, state of the input, genes, contexts."""
    state = dict(cells.input_state)
    if cells.n_without_counts:
        state["n_cells_without_counts"] = cells.n_without_counts
    return {
        "slots_read": cells.slots_read,
        "input": state,
        "genes": cells.gene_summary,
        "contexts": {
            "n_contexts": len(cells.contexts),
            "names": np.array(cells.context_names, dtype=object),
            "sizes": np.array([len(rows) for rows in cells.contexts], dtype=np.int64),
        },
    }


def _described(value: Any) -> Any:
    """Give an argument as something that can be kept: others than data by their type."""
    if isinstance(value, AnnData):
        return f"AnnData {value.n_obs} × {value.n_vars}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    try:
        return _plain(value, "argument")
    except TypeError:
        return type(value).__name__


def _plain(value: Any, name: str) -> Any:
    """`value` as h5ad keeps it. What it would not keep is a mistake of the tool: TypeError."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        if with_slash := [key for key in plain if "/" in key]:
            raise TypeError(f"{name} has a key with a slash, which h5ad cannot keep: {with_slash}")
        return {key: item for key, item in plain.items() if item is not None}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | bool | int | float | pd.DataFrame):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            return array
        if all(isinstance(item, str) for item in array.ravel()):
            return array.astype(object)
    raise TypeError(f"{name} is a {type(value).__name__}, which a record cannot keep: {value!r}")


# --------------------------------------------------------------------------------------- the slots


def check_slots(
    adata: AnnData, slots: Iterable[tuple[str, str]], slots_read: Sequence[str] = ()
) -> None:
    """Raise unless slots can be written; to be asked before anything is computed.

    Parameters
    ----------
    adata
        Where to write.
    slots
        Pairs like ``("obsm", "X_cellplm")``.
    slots_read
        :attr:`Cells.slots_read`.

    Raises
    ------
    SlotError
        A key is no text, is empty, has a slash (h5ad cannot keep it), or is that of an input; or
        ``uns["cellplm"]``, where records go, is no dict.
    InputError
        `adata` is a view of a file.
    """
    if adata.is_view and adata.isbacked:
        raise InputError(
            "adata is a view of a backed file, to which nothing can be written. Pass "
            "adata.to_memory(), or the whole."
        )
    for attribute, key in slots:
        if not isinstance(key, str) or not key or "/" in key:
            raise SlotError(
                f"{key!r} cannot be a key of adata.{attribute}: it must be text, not empty and "
                "without a slash. Choose another key_added."
            )
        if f"{attribute}[{key!r}]" in slots_read:
            raise SlotError(
                f"adata.{attribute}[{key!r}] is an input of this call and would be overwritten. "
                "Choose another key_added."
            )
    records = adata.uns.get(RECORDS, {})
    if not isinstance(records, Mapping):
        raise SlotError(
            f"adata.uns[{RECORDS!r}] must be a dict of records; it is a {type(records).__name__}. "
            "Move it to another key."
        )


def write_slots(
    adata: AnnData, slots: Mapping[tuple[str, str], Any], record: dict[str, Any], key_added: str
) -> None:
    """Write all slots and the record, or nothing.

    Whatever happens on the way, an interrupt included, leaves the object as it was. A view becomes
    an object of its own, as with all of scanpy, and its parent stays as it is.

    Parameters
    ----------
    adata
        Where to write.
    slots
        Values by slot, like ``{("obsm", "X_cellplm"): latent}``. In ``obs`` and ``var``, a value
        has one entry per row, whatever its index; slots that exist are replaced.
    record
        What :func:`build_record` gave; it goes to ``uns["cellplm"][key_added]``.
    key_added
        Key of the record.

    Raises
    ------
    SlotError
        A key cannot be written (see :func:`check_slots`).
    InputError
        A value has another shape than its slot; or `adata` is a view of a file.
    """
    check_slots(adata, [*slots, ("uns", key_added)], record.get("slots_read", ()))
    for (attribute, key), value in slots.items():
        _check_shape(adata, attribute, key, value)
    records = {**adata.uns.get(RECORDS, {}), key_added: record}
    with _all_or_nothing(adata) as target:
        for (attribute, key), value in slots.items():
            target.set(attribute, key, value)
        target.set("uns", RECORDS, records)
    for attribute, key in slots:
        logger.info("adata.%s[%r] is written.", attribute, key)


def _check_shape(adata: AnnData, attribute: str, key: str, value: Any) -> None:
    """Raise unless `value` has the shape of the slot."""
    n_obs, n_vars = adata.shape
    expected: dict[str, tuple[int | None, ...]] = {
        "obs": (n_obs,),
        "var": (n_vars,),
        "obsm": (n_obs, None),
        "varm": (n_vars, None),
        "layers": (n_obs, n_vars),
        "obsp": (n_obs, n_obs),
        "varp": (n_vars, n_vars),
    }
    if attribute == "uns":
        return
    shape = np.shape(value) if not hasattr(value, "shape") else value.shape
    wanted = expected[attribute]
    if len(shape) != len(wanted) or any(
        w is not None and s != w for s, w in zip(shape, wanted, strict=True)
    ):
        raise InputError(
            f"adata.{attribute}[{key!r}] needs the shape "
            f"({', '.join('any' if w is None else str(w) for w in wanted)}); got {shape}."
        )


class _Target:
    """An AnnData being written to, and how to get back."""

    def __init__(self, adata: AnnData) -> None:
        self.adata = adata
        self.before: list[tuple[Any, str, Any]] = []

    def set(self, attribute: str, key: str, value: Any) -> None:
        slot = getattr(self.adata, attribute)
        if attribute in ("obs", "var"):
            value = value.array if isinstance(value, pd.Series) else value
        # Noted first: an interrupt may come between any two lines.
        self.before.append((slot, key, slot.get(key, _MISSING)))
        slot[key] = value

    def restore(self) -> None:
        for slot, key, value in reversed(self.before):
            if value is not _MISSING:
                slot[key] = value
            elif key in slot:
                del slot[key]


@contextmanager
def _all_or_nothing(adata: AnnData) -> Iterator[_Target]:
    """Write to `adata`, or for a view to what it is going to be, and undo it on any exception."""
    target = _Target(adata.copy() if adata.is_view else adata)
    state = dict(vars(adata))
    try:
        yield target
        if adata.is_view:
            adata._init_as_actual(target.adata)
    except BaseException:
        if target.adata is adata:
            target.restore()
        else:
            vars(adata).clear()
            vars(adata).update(state)
        raise
