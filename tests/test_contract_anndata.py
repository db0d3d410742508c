"""What every function of `cp.tl` and `cp.pp` does to an AnnData, and never does.

Functions are found by introspection, run with the default model on real cells. One that cannot be
called with `adata` alone needs a line in NEEDS.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from numpydoc.docscrape import NumpyDocString
from scipy import sparse

import cellplm_tl as cp
from cellplm_tl._anndata import write_slots
from cellplm_tl._errors import (
    CountsError,
    InputError,
    ModelNotFoundError,
    OptionError,
    SlotError,
)

PACKAGE = Path(cp.__file__).parent
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{folder}.{name}": getattr(getattr(cp, folder), name)
    for folder in ("tl", "pp")
    for name in getattr(cp, folder).__all__
}
# What a function cannot be called without, made from the cells it is called on.
NEEDS: dict[str, Callable[[ad.AnnData], dict[str, Any]]] = {
    "tl.annotate": lambda _: {"reference": labelled_reference(), "labels_key": "kind"},
}


@functools.cache
def labelled_reference() -> ad.AnnData:
    """Give 110 other cells, labelled as B cells, monocytes or what else they are, with colours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's file is older than its own format
        full = sc.datasets.pbmc68k_reduced()
    reference = ad.AnnData(full.raw.X, obs=full.obs[["bulk_labels"]], var=full.raw.var[[]])
    reference = reference[3::6][:110].copy()
    kinds = {"CD19+ B": "B", "CD14+ Monocyte": "monocyte"}
    kind = reference.obs["bulk_labels"].astype(str).map(kinds).fillna("other")
    reference.obs["kind"] = kind.astype("category")
    reference.uns["kind_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    return reference


# These draw for one entry after the other: in another order a seed draws others, as it must if the
# splits that others have published by the same rule are to come out.
DRAWING = {"pp.mask_counts", "pp.thin_counts"}


def having(*parameters: str) -> list[str]:
    """List the functions that have all of these parameters."""
    return [
        name
        for name, function in FUNCTIONS.items()
        if set(parameters) <= set(inspect.signature(function).parameters)
    ]


WRITING = having("copy")
READING_COUNTS = having("layer")

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_without_draws = pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in DRAWING])
each_writing = pytest.mark.parametrize("name", WRITING)
each_reading_counts = pytest.mark.parametrize("name", READING_COUNTS)
# Where the case is meant to be odd, a warning of ours is as good as none.
odd_case = pytest.mark.filterwarnings("ignore::cellplm_tl.CellPLMWarning")


def call(name: str, adata: ad.AnnData, **options: Any) -> ad.AnnData | None:
    needs = NEEDS[name](adata) if name in NEEDS else {}
    return FUNCTIONS[name](adata, **(needs | options))


def results(name: str, adata: ad.AnnData, **options: Any) -> dict[tuple[str, str], Any]:
    """Call a function; give what it wrote, or the slots of what it returned, without the record."""
    given = set(slots(adata))
    returned = call(name, adata, **options)
    written = slots(adata if returned is None else returned)
    return {slot: v for slot, v in written.items() if slot not in given and slot[0] != "uns"}


@pytest.fixture
def cells(pbmc_counts: ad.AnnData) -> ad.AnnData:
    """Give 117 of the cells: counts, with something in every kind of slot."""
    return furnished(pbmc_counts[::6].copy())


def furnished(adata: ad.AnnData) -> ad.AnnData:
    """Put something of the user's into every kind of slot."""
    rng = np.random.default_rng(0)
    adata.obsm["mine"] = rng.random((adata.n_obs, 2))
    adata.varm["mine"] = rng.random((adata.n_vars, 2))
    adata.layers["mine"] = rng.random(adata.shape)
    adata.obsp["mine"] = sparse.identity(adata.n_obs, format="csr")
    adata.varp["mine"] = sparse.identity(adata.n_vars, format="csr")
    adata.var["mine"] = rng.random(adata.n_vars)
    adata.uns["mine"] = {"deep": {"deeper": np.arange(3)}}
    return adata


# Comparing


def slots(adata: ad.AnnData) -> dict[tuple[str, str], Any]:
    """Give everything in an AnnData, by slot and key; columns of a frame one by one."""
    found: dict[tuple[str, str], Any] = {("X", ""): adata.X}
    for slot in ("obs", "var", "obsm", "varm", "layers", "obsp", "varp", "uns"):
        for key in getattr(adata, slot):
            found[slot, key] = getattr(adata, slot)[key]
    found["obs_names", ""] = adata.obs_names
    found["var_names", ""] = adata.var_names
    return found


def assert_unchanged(adata: ad.AnnData, before: ad.AnnData) -> None:
    assert_same(slots(adata), slots(before))


def assert_same(one: Any, other: Any) -> None:
    """Compare values of slots to the bit: type, dtype, order, NaN where NaN was."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, pd.Series | pd.Index):
        assert one.equals(other)
        assert one.dtype == other.dtype
    else:
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
        np.testing.assert_array_equal(_plain(one), _plain(other))


def assert_close(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    """Compare results to rounding; the largest number of an array sets the scale."""
    assert set(one) == set(other)
    for slot, value in one.items():
        a, b = _plain(value), _plain(other[slot])
        if a.dtype.kind not in "fc":
            np.testing.assert_array_equal(a, b, err_msg=str(slot))
            continue
        # Principal components of nearly one size mix what rounding leaves: hence 1e-4 of the scale.
        scale = np.nanmax(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale, err_msg=str(slot))


def sorted_deep(value: Any) -> Any:
    """Give nested dictionaries in the order of their keys, as a file does."""
    return {k: sorted_deep(value[k]) for k in sorted(value)} if isinstance(value, dict) else value


def _plain(value: Any) -> np.ndarray:
    if sparse.issparse(value):
        return value.toarray()
    return np.asarray(value)


def reordered(result: dict[tuple[str, str], Any], **axes: np.ndarray) -> dict[Any, Any]:
    """Take rows (`obs=`) and columns (`var=`) of results in another order."""
    obs, var = axes.get("obs"), axes.get("var")
    by_axis = {
        "obs": (obs,),
        "obsm": (obs,),
        "obsp": (obs, obs),
        "var": (var,),
        "varm": (var,),
        "varp": (var, var),
        "layers": (obs, var),
    }
    taken = {}
    for slot, value in result.items():
        array = _plain(value)
        for axis, order in enumerate(by_axis[slot[0]]):
            array = array if order is None else np.take(array, order, axis=axis)
        taken[slot] = array
    return taken


# What is written


@each_writing
def test_it_writes_the_slots_its_docstring_names_and_touches_no_other(name, cells):
    before = cells.copy()
    assert call(name, cells) is None
    new = [slot for slot in slots(cells) if slot not in slots(before)]
    doc = NumpyDocString(inspect.getdoc(FUNCTIONS[name]))
    returns = "\n".join(line for entry in doc["Returns"] for line in entry.desc)
    default = inspect.signature(FUNCTIONS[name]).parameters.get("key_added")
    documented = {
        (slot, default.default if key == "key_added" else key.strip('"'))
        for slot, key in re.findall(r'\b([a-z]+)\[("\w+"|key_added)\]', returns)
    }
    assert set(new) == documented
    for slot, key in new:
        del getattr(cells, slot)[key]
    assert_unchanged(cells, before)


@pytest.mark.parametrize("name", having("copy", "key_added"))
def test_key_added_moves_all_slots_together(name, cells):
    first = results(name, cells)
    before = cells.copy()
    second = results(name, cells, key_added="other")
    assert len(second) == len(first)
    assert all("other" in key for _, key in second)
    assert_close(dict(zip(first, second.values(), strict=True)), first)
    assert_close(dict.fromkeys(first) | {s: slots(cells)[s] for s in first}, first)
    assert len(cells.uns["cellplm"]) == len(before.uns["cellplm"]) + 1


@each_writing
def test_calling_again_gives_the_same_slots(name, cells):
    first = results(name, cells)
    again = cells.copy()
    call(name, again)
    assert list(slots(again)) == list(slots(cells))
    assert_close({slot: slots(again)[slot] for slot in first}, first)


@each_writing
def test_copy_gives_a_new_object_and_leaves_the_old_one_as_it_was(name, cells):
    before = cells.copy()
    new = call(name, cells, copy=True)
    assert isinstance(new, ad.AnnData)
    assert_unchanged(cells, before)
    call(name, cells)
    assert list(slots(new)) == list(slots(cells))
    assert_close(*({s: v for s, v in slots(a).items() if s[0] != "uns"} for a in (new, cells)))
    new.X.data[0] = 99
    assert cells.X.data[0] != 99


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WRITING])
def test_what_returns_an_object_leaves_its_input_alone(name, cells):
    before = cells.copy()
    assert isinstance(call(name, cells), ad.AnnData)
    assert_unchanged(cells, before)


@each_function
def test_the_record_says_how_it_was_made_and_survives_a_file(name, cells, tmp_path):
    result = call(name, cells)
    result = cells if result is None else result
    ((key, record),) = result.uns["cellplm"].items()
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert key == (parameters["key_added"].default if "key_added" in parameters else name[3:])
    assert f"tl.{record['tool']}" == name or f"pp.{record['tool']}" == name
    assert record["package_version"] == cp.__version__
    assert set(record["parameters"]) <= set(parameters)
    if "model" in parameters:
        model = cp.models.load(parameters["model"].default)
        assert (record["model"]["name"], record["model"]["sha256"]) == (model.name, model.sha256)
    result.write_h5ad(tmp_path / "written.h5ad")
    read = ad.read_h5ad(tmp_path / "written.h5ad")
    assert_same(sorted_deep(read.uns["cellplm"]), sorted_deep(result.uns["cellplm"]))
    assert_close(*({s: v for s, v in slots(a).items() if s[0] != "uns"} for a in (read, result)))


@each_function
def test_the_record_holds_the_parameters_as_called(name, cells):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    cells.var["ids"], cells.layers["counts"] = cells.var_names, cells.X.copy()
    options = {"gene_key": "ids", "layer": "counts", "random_state": 3, "key_added": "other"}
    options = {word: value for word, value in options.items() if word in parameters}
    result = call(name, cells, **options)
    (record,) = (cells if result is None else result).uns["cellplm"].values()
    assert {word: record["parameters"].get(word) for word in options} == options
    assert not [word for word, value in record["parameters"].items() if value is None]


# What may be given


def _write(adata: ad.AnnData, path: Path, **encoding: Any) -> ad.AnnData:
    adata.write_h5ad(path, **encoding)
    return ad.read_h5ad(path, backed="r")


def _with_x(adata: ad.AnnData, x: Any) -> ad.AnnData:
    return ad.AnnData(x, obs=adata.obs, var=adata.var)


def _read_only(adata: ad.AnnData) -> ad.AnnData:
    for array in (adata.X.data, adata.X.indices, adata.X.indptr):
        array.flags.writeable = False
    return adata


def _view(adata: ad.AnnData) -> ad.AnnData:
    """Give a view that holds the cells of `adata` and no others, of an object in another order."""
    twice = ad.concat([adata, adata], index_unique="-")
    twice.var = adata.var
    order = np.arange(adata.n_obs)
    view = twice[order]
    assert view.is_view
    return view


def _unsorted(adata: ad.AnnData) -> ad.AnnData:
    x = adata.X.copy()
    for start, end in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.indices[start:end] = x.indices[start:end][::-1]
        x.data[start:end] = x.data[start:end][::-1]
    x.has_sorted_indices = False
    return _with_x(adata, x)


def _explicit_zeros(adata: ad.AnnData) -> ad.AnnData:
    dense = adata.X.toarray()
    rows, columns = np.indices(dense.shape).reshape(2, -1)
    return _with_x(adata, sparse.csr_matrix((dense.ravel(), (rows, columns)), shape=dense.shape))


FORMS: dict[str, Callable[[ad.AnnData, Path], ad.AnnData]] = {
    "csc": lambda a, _: _with_x(a, a.X.tocsc()),
    "csr_array": lambda a, _: _with_x(a, sparse.csr_array(a.X)),
    "csc_array": lambda a, _: _with_x(a, sparse.csc_array(a.X)),
    "unsorted": lambda a, _: _unsorted(a),
    "explicit zeros": lambda a, _: _explicit_zeros(a),
    "dense": lambda a, _: _with_x(a, a.X.toarray()),
    "dense, column-major": lambda a, _: _with_x(a, np.asfortranarray(a.X.toarray())),
    "float64": lambda a, _: _with_x(a, a.X.astype(np.float64)),
    "int32": lambda a, _: _with_x(a, a.X.astype(np.int32)),
    "uint16, dense": lambda a, _: _with_x(a, a.X.toarray().astype(np.uint16)),
    "read-only": lambda a, _: _read_only(a),
    "view": lambda a, _: _view(a),
    "layer": lambda a, _: ad.AnnData(
        -np.ones(a.shape), obs=a.obs, var=a.var, layers={"given": a.X}
    ),
    "backed": lambda a, path: _write(a, path),
    "backed, csc": lambda a, path: _write(_with_x(a, a.X.tocsc()), path),
    "backed, dense": lambda a, path: _write(_with_x(a, a.X.toarray()), path, compression="gzip"),
}


@odd_case
@each_reading_counts
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_counts_gives_the_same(name, form, pbmc_counts, tmp_path):
    cells = pbmc_counts[::6].copy()
    expected = results(name, cells.copy())
    path = tmp_path / "backed.h5ad"
    given = FORMS[form](cells, path)
    digest = hashlib.sha256(path.read_bytes()).digest() if path.exists() else None
    with warnings.catch_warnings():  # anndata says that writing to a view copies it
        warnings.simplefilter("ignore", ad.ImplicitModificationWarning)
        options = {"layer": "given"} if form == "layer" else {}
        assert_close(results(name, given, **options), expected)
    if digest:
        given.file.close()
        assert hashlib.sha256(path.read_bytes()).digest() == digest


@each_function
def test_lognormalised_cells_do_as_well(name, pbmc, pbmc_counts):
    of_lognorm, of_counts = pbmc[::6].copy(), pbmc_counts[::6].copy()
    assert_close(results(name, of_lognorm), results(name, of_counts))


@odd_case
@each_function
@pytest.mark.parametrize("n_cells", [0, 1, 2])
def test_few_cells(name, n_cells, pbmc_counts):
    cells = pbmc_counts[:n_cells].copy()
    for slot, value in results(name, cells).items():
        if slot[0] in {"obs", "obsm", "obsp", "layers"}:
            assert len(_plain(value)) == n_cells
        array = _plain(value)
        if slot[0] == "varm":  # a gene that the model lacks is a row of NaN
            array = array[~np.isnan(array).all(axis=1)]
            assert len(array)
        assert array.dtype.kind != "f" or np.isfinite(array).all(), slot


@odd_case
@each_reading_counts
def test_empty_cells_get_finite_numbers(name, pbmc_counts):
    cells = pbmc_counts[::6].copy()
    cells.X = sparse.diags((np.arange(cells.n_obs) > 2).astype(np.float32)).tocsr() @ cells.X
    for slot, value in results(name, cells).items():
        array = _plain(value)
        assert array.dtype.kind != "f" or np.isfinite(array).all(), slot


@each_function
def test_duplicated_names_of_cells_do_not_matter(name, pbmc_counts):
    cells = pbmc_counts[::6].copy()
    expected = results(name, cells.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata warns
        cells.obs_names = ["cell"] * cells.n_obs
        assert_close(results(name, cells), expected)


@odd_case
@each_reading_counts
def test_columns_of_one_gene_are_summed(name, pbmc_counts):
    cells = pbmc_counts[::6].copy()
    expected = results(name, cells.copy())
    half = cells.X.copy()
    half.data = np.floor(half.data / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata warns of duplicated names
        both = sparse.hstack([half, cells.X - half], format="csr")
        names = [*cells.var_names, *cells.var_names]
        split = ad.AnnData(both, obs=cells.obs, var=pd.DataFrame(index=names))
        found = results(name, split)
    per_cell = {slot: v for slot, v in found.items() if slot[0] in {"obs", "obsm", "obsp"}}
    assert_close(per_cell, {slot: expected[slot] for slot in per_cell})


# What is refused


@each_reading_counts
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["sparse", "dense"])
def test_what_is_no_count_is_an_error_that_names_the_cell(name, value, form, cells):
    dense = cells.X.toarray()
    dense[101, 40] = value  # in one cell, far from the first
    cells.X = form(dense)
    before = cells.copy()
    with pytest.raises(CountsError, match=re.escape(cells.obs_names[101])):
        call(name, cells)
    assert_unchanged(cells, before)


@each_reading_counts
def test_scaled_values_are_refused_with_a_pointer(name, pbmc):
    cells = pbmc[::6].copy()
    cells.raw = cells.copy()
    dense = cells.X.toarray()
    cells.X = (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 1)
    with pytest.raises(CountsError, match=r"negative.*adata\.raw\.to_adata\(\)"):
        call(name, cells)
    cells.layers["lognorm"] = cells.raw.X
    with pytest.raises(CountsError, match="'lognorm'.*layer="):
        call(name, cells)


@each_function
def test_what_is_no_anndata_is_an_error(name, cells):
    with pytest.raises(InputError, match="adata must be an AnnData object; got ndarray"):
        FUNCTIONS[name](cells.X.toarray(), **(NEEDS[name](cells) if name in NEEDS else {}))


@pytest.mark.parametrize(
    ("name", "word", "error"),
    [
        (name, word, error)
        for word, error in {
            "device": OptionError,
            "model": ModelNotFoundError,
            "layer": SlotError,
            "gene_key": SlotError,
            "batch_key": SlotError,
            "context": OptionError,
        }.items()
        for name in having(word)
    ],
)
def test_a_value_that_means_nothing_is_an_error_that_names_it(name, word, error, cells):
    before = cells.copy()
    with pytest.raises(error, match="no_such_thing"):
        call(name, cells, **{word: "no_such_thing"})
    assert_unchanged(cells, before)


# What does not depend on what


@each_function
def test_the_same_call_gives_the_same_bits_and_touches_no_global_generator(name, cells):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    first = results(name, cells.copy())
    drawn = torch.rand(3), np.random.random(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert torch.equal(drawn[0], torch.rand(3))
    assert_same(drawn[1], np.random.random(3))  # noqa: NPY002
    second = results(name, cells.copy())
    assert list(first) == list(second)
    for slot, value in first.items():
        np.testing.assert_array_equal(_plain(value), _plain(second[slot]), err_msg=str(slot))


@pytest.mark.parametrize("name", having("random_state"))
def test_random_state_takes_a_generator_too(name, cells):
    first = results(name, cells.copy(), random_state=np.random.default_rng(5))
    second = results(name, cells.copy(), random_state=np.random.default_rng(5))
    assert_close(first, second)


@each_without_draws
def test_the_order_of_cells_does_not_matter(name, pbmc_counts):
    cells = pbmc_counts[::6].copy()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    expected = reordered(results(name, cells.copy()), obs=order)
    assert_close(results(name, cells[order].copy()), expected)


@each_without_draws
def test_the_order_of_genes_does_not_matter(name, pbmc_counts):
    cells = pbmc_counts[::6].copy()
    order = np.random.default_rng(0).permutation(cells.n_vars)
    expected = reordered(results(name, cells.copy()), var=order)
    assert_close(results(name, cells[:, order].copy()), expected)


# All or nothing


def raising_at(reached: Callable[[Any, str], bool]) -> Callable[..., Any]:
    """Give a trace or profile function that interrupts the program at the first such point."""

    def watch(frame: Any, event: str, _: Any) -> Any:
        if reached(frame, event):
            raise KeyboardInterrupt
        return watch

    return watch


@each_writing
def test_an_interrupt_before_the_writing_leaves_the_object_as_it_was(name, cells):
    entered = []  # functions of the package, in their order

    def see(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and code not in entered:
            entered.append(code)

    before = cells.copy()
    call(name, before.copy())  # what is loaded once is loaded now
    sys.setprofile(see)
    call(name, before.copy())
    sys.setprofile(None)
    writing = entered.index(write_slots.__code__)
    for step in {*entered[: writing : writing // 6 + 1], entered[writing]}:
        sys.setprofile(raising_at(lambda frame, event, step=step: frame.f_code is step))
        try:
            with pytest.raises(KeyboardInterrupt):
                call(name, cells)
        finally:
            sys.setprofile(None)
        assert_unchanged(cells, before)


@each_writing
@pytest.mark.parametrize("form", ["object", "view"])
def test_an_interrupt_at_any_line_of_the_writing_leaves_all_or_nothing(
    name, form, cells, monkeypatch
):
    module = sys.modules[FUNCTIONS[name].__module__]
    monkeypatch.setattr(module, "write_slots", lambda *given: written.append(given[1:]))
    written: list[Any] = []
    call(name, cells)
    (arguments,) = written
    write_slots(after := cells.copy(), *arguments)

    def at_line(number: int) -> Callable[..., Any]:
        file, lines = write_slots.__code__.co_filename, itertools.count()
        return raising_at(
            lambda frame, event: (
                event == "line" and frame.f_code.co_filename == file and next(lines) == number
            )
        )

    for n_lines in itertools.count():
        target = cells.copy() if form == "object" else cells[:]
        sys.settrace(at_line(n_lines))
        try:
            write_slots(target, *arguments)
            break  # it has fewer lines than this
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if set(slots(target)) != set(slots(after)):
            assert_unchanged(target, cells if form == "object" else cells[:])
    assert n_lines > 10


@each_writing
def test_a_slot_that_cannot_be_written_leaves_the_object_as_it_was(name, cells):
    cells.uns["cellplm"] = "the user's own note"
    before = cells.copy()
    with pytest.raises(SlotError, match="cellplm"):
        call(name, cells)
    assert_unchanged(cells, before)
