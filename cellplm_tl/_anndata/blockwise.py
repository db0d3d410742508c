"""A new file with dense matrices, written block by block: for results that memory cannot hold."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata as ad
import h5py
import numpy as np
from anndata.io import write_elem
from numpy.typing import NDArray

from cellplm_tl._anndata.write import RECORDS
from cellplm_tl._errors import OptionError

SUFFIXES = (".h5ad", ".zarr")
CHUNK = (256, 2048)  # cells and genes of a matrix that are stored together
# How AnnData marks a dense matrix on disk.
DENSE = {"encoding-type": "array", "encoding-version": "0.2.0"}


def check_new_file(out: str | os.PathLike[str], n_bytes: int) -> Path:
    """Raise :class:`OptionError` unless a file can be made there; to be asked before any work."""
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise OptionError(f"out must end in {' or '.join(SUFFIXES)}; got {str(out)!r}.")
    if path.exists():
        raise OptionError(f"out={str(out)!r} exists: choose another name, nothing is overwritten.")
    if not path.parent.is_dir():
        raise OptionError(f"out={str(out)!r}: the folder {str(path.parent)!r} does not exist.")
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        needed, left = (f"{n / 1e9:.1f} GB" for n in (n_bytes, free))
        raise OptionError(
            f"out={str(out)!r} needs {needed}, {left} are free there: name another disk, or fewer "
            "genes with genes=[…]."
        )
    return path


class DenseFile:
    """A file that appears when it is complete.

    Parameters
    ----------
    path
        From :func:`check_new_file`.
    adata
        Whose `obs`, and of whose `var` the rows of `columns`, the file takes.
    columns
        Positions of the columns that are written.
    names
        Of the matrices: the first becomes ``X``, the others layers.
    var
        Further columns of `var`, shape ``(columns,)`` each.

    Use it in a `with` block; an exception in there leaves no file.
    """

    def __init__(
        self,
        path: Path,
        adata: Any,
        columns: NDArray[np.int64],
        names: Sequence[str],
        var: Mapping[str, NDArray[Any]],
    ):
        self._path, self._names = path, list(names)
        self._frames = ad.AnnData(obs=adata.obs.copy(), var=adata.var.iloc[columns].assign(**var))
        self._group: Any = None

    def __enter__(self) -> DenseFile:
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent))
        self._aside = self._folder / self._path.name
        try:
            self._open()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def _open(self) -> None:
        if self._path.suffix == ".h5ad":
            self._frames.write_h5ad(self._aside)
            self._group = h5py.File(self._aside, "r+")
        else:
            import zarr  # an extra: only who writes such files needs it

            self._frames.write_zarr(self._aside)
            self._group = zarr.open_group(str(self._aside), mode="r+", use_consolidated=False)
        shape = self._frames.shape
        chunks = tuple(max(1, min(n, most)) for n, most in zip(shape, CHUNK, strict=True))
        for key in self._keys():
            if key in self._group:
                del self._group[key]
            make = getattr(self._group, "create_array", self._group.create_dataset)
            array = make(key, shape=shape, dtype="float32", chunks=chunks)
            array.attrs.update(DENSE)

    def _keys(self) -> list[str]:
        return ["X", *(f"layers/{name}" for name in self._names[1:])]

    def write(self, rows: slice, matrices: dict[str, NDArray[np.float32]]) -> None:
        """Write some neighbouring rows of every matrix."""
        for key, name in zip(self._keys(), self._names, strict=True):
            self._group[key][rows] = matrices[name]

    def finish(self, record: dict[str, Any], key_added: str) -> None:
        """Add the record of the call."""
        write_elem(self._group, "uns", {RECORDS: {key_added: record}})
        if self._path.suffix == ".zarr":
            import zarr

            zarr.consolidate_metadata(str(self._aside))  # what was written first knew no matrix

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if hasattr(self._group, "close"):
                self._group.close()
            if kind is None and self._path.exists():
                raise OptionError(
                    f"out={str(self._path)!r} has appeared meanwhile: it is left alone."
                )
            if kind is None:
                os.rename(self._aside, self._path)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
