"""The record of a call, and all of its slots at once or none."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellplm_tl._anndata import build_record, check_slots, read_cells, write_slots
from cellplm_tl._anndata import write as write_module
from cellplm_tl._errors import CountsWarning, InputError, SlotError

RECORD = {"tool": "test", "slots_read": np.array(["X"], dtype=object)}


@pytest.fixture
def adata(counts, make_anndata) -> ad.AnnData:
    adata = make_anndata(sparse.csr_matrix(counts))
    adata.obsm["X_pca"] = np.zeros((37, 2))
    adata.uns["cellplm"] = {"earlier": {"tool": "another"}}
    return adata


def make_slots() -> dict[tuple[str, str], Any]:
    """Give one value for every kind of slot."""
    rng = np.random.default_rng(0)
    return {
        ("obsm", "X_test"): rng.random((37, 5), dtype=np.float32),
        ("obs", "test_known"): rng.random(37, dtype=np.float32),
        ("obs", "test_label"): pd.Categorical(["x", "y"] * 18 + ["x"]),
        ("var", "test_text"): np.array([f"g{i}" for i in range(113)], dtype=object),
        ("varm", "test_genes"): rng.random((113, 3)),
        ("layers", "test"): sparse.csr_matrix(rng.random((37, 113))),
        ("obsp", "test"): sparse.csr_matrix(np.eye(37)),
        ("obsm", "test_frame"): pd.DataFrame(
            {"a": rng.random(37)}, [f"cell{i}" for i in range(37)]
        ),
        ("uns", "test_more"): {"score": 0.5},
    }


def state(adata: ad.AnnData) -> dict[str, Any]:
    """List everything that an AnnData holds, in its order, with a copy of the values."""
    found: dict[str, Any] = {"X": adata.X.copy(), "uns": dict(adata.uns)}
    for attribute in ("obs", "var", "obsm", "varm", "layers", "obsp", "varp"):
        slot = getattr(adata, attribute)
        found[attribute] = {key: slot[key].copy() for key in slot}
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if sparse.issparse(a):
        return (a != b).nnz == 0
    if isinstance(a, pd.Series | pd.DataFrame):
        return a.equals(b)
    return np.array_equal(a, b)


# --------------------------------------------------------------------------------------- the slots


@pytest.mark.parametrize("is_view", [False, True])
def test_every_slot_is_written(is_view, adata, caplog):
    parent, before = adata, state(adata)
    adata = adata[:] if is_view else adata
    with caplog.at_level(logging.INFO, "cellplm_tl"), warnings.catch_warnings():
        warnings.simplefilter("error")
        write_slots(adata, make_slots(), RECORD, "X_test")
    assert not adata.is_view
    for (attribute, key), value in make_slots().items():
        written = getattr(adata, attribute)[key]
        assert same(written, value) or list(written) == list(value)
        assert f"adata.{attribute}[{key!r}] is written." in caplog.messages
    assert set(adata.uns["cellplm"]) == {"earlier", "X_test"}
    assert adata.uns["cellplm"]["X_test"]["tool"] == "test"
    if is_view:
        assert same(state(parent), before)


def test_slots_that_exist_are_replaced_in_their_place(adata):
    adata.obs["test_known"] = 0.0
    adata.obs["last"] = 1
    write_slots(adata, make_slots(), RECORD, "X_test")
    write_slots(adata, make_slots(), {**RECORD, "run": 2}, "X_test")
    assert list(adata.obs)[:3] == ["sample", "test_known", "last"]
    assert adata.uns["cellplm"]["X_test"]["run"] == 2


def test_values_in_obs_go_by_position(adata):
    adata.obs_names = ["same"] * 37
    write_slots(
        adata, {("obs", "test"): pd.Series(np.arange(37), index=np.arange(37)[::-1])}, RECORD, "k"
    )
    assert adata.obs["test"].tolist() == list(range(37))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("is_view", [False, True])
def test_a_failure_at_any_step_leaves_the_object_as_it_was(is_view, error, adata, monkeypatch):
    adata.obs["test_known"] = 0.0  # one slot that exists before
    parent = adata
    adata = adata[3:30, ::-1] if is_view else adata
    slots = {
        key: value[3:30] if is_view and key[0] in ("obs", "obsm") else value
        for key, value in make_slots().items()
        if not is_view or key[0] in ("obs", "obsm", "uns")
    }
    before, parent_before = state(adata), state(parent)
    original = write_module._Target.set
    for n_done in range(len(slots) + 1):
        for is_after in (False, True):
            calls = 0

            def fail(self, *args, n_done=n_done, is_after=is_after):
                nonlocal calls
                calls += 1
                if calls <= n_done or is_after:
                    original(self, *args)
                if calls > n_done:
                    raise error

            monkeypatch.setattr(write_module._Target, "set", fail)
            with pytest.raises(error):
                write_slots(adata, slots, RECORD, "X_test")
            assert calls == n_done + 1
            assert same(state(adata), before)
            assert same(state(parent), parent_before)
            assert adata.is_view == is_view


def test_a_failure_while_a_view_becomes_an_object(adata, monkeypatch):
    view = adata[3:30]
    before = state(view)
    original = ad.AnnData._init_as_actual

    def fail(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self is view:
            raise KeyboardInterrupt

    monkeypatch.setattr(ad.AnnData, "_init_as_actual", fail)
    with pytest.raises(KeyboardInterrupt):
        write_slots(view, {("obs", "test"): np.zeros(27)}, RECORD, "test")
    assert view.is_view
    assert same(state(view), before)


@pytest.mark.parametrize(
    ("attribute", "value", "sentence"),
    [
        (
            "obsm",
            np.zeros((36, 2)),
            r"adata\.obsm\['k'\] needs the shape \(37, any\); got \(36, 2\)",
        ),
        ("obsm", np.zeros(37), r"needs the shape \(37, any\); got \(37,\)"),
        ("obs", np.zeros(113), r"needs the shape \(37\); got \(113,\)"),
        ("obs", [1, 2], r"needs the shape \(37\); got \(2,\)"),
        ("var", np.zeros((113, 1)), r"needs the shape \(113\); got \(113, 1\)"),
        ("varm", np.zeros((37, 2)), r"needs the shape \(113, any\); got \(37, 2\)"),
        ("layers", np.zeros((37, 112)), r"needs the shape \(37, 113\); got \(37, 112\)"),
        ("obsp", sparse.csr_matrix((37, 36)), r"needs the shape \(37, 37\); got \(37, 36\)"),
    ],
)
def test_shapes_are_checked_before_anything_is_written(attribute, value, sentence, adata):
    before = state(adata)
    with pytest.raises(InputError, match=sentence):
        write_slots(adata, {**make_slots(), (attribute, "k"): value}, RECORD, "k")
    assert same(state(adata), before)


@pytest.mark.parametrize("key", ["", "a/b", None, 3])
def test_keys_that_cannot_be_written(key, adata):
    sentence = "must be text, not empty and without a slash. Choose another key_added."
    with pytest.raises(SlotError, match=sentence):
        write_slots(adata, {("obs", "fine"): np.zeros(37)}, RECORD, key)
    with pytest.raises(SlotError, match=sentence):
        check_slots(adata, [("obsm", key)])
    assert "fine" not in adata.obs


def test_inputs_are_not_overwritten(adata):
    adata.obsm["spatial"] = np.zeros((37, 2))
    genes = adata.var_names.tolist()
    adata.var["ids"], adata.layers["raw"] = genes, adata.X
    cells = read_cells(adata, genes, layer="raw", gene_key="ids", batch_key="sample")
    slots = [("obsm", "spatial"), ("obs", "sample"), ("layers", "raw"), ("var", "ids")]
    assert len(cells.slots_read) == 4
    for attribute, key in slots:
        with pytest.raises(SlotError, match="is an input of this call and would be overwritten"):
            check_slots(adata, [(attribute, key)], cells.slots_read)
    check_slots(adata, [("obs", "spatial"), ("obsm", "sample")], cells.slots_read)


def test_a_foreign_record_is_not_overwritten(adata):
    adata.uns["cellplm"] = "mine"
    with pytest.raises(SlotError, match=r"adata\.uns\['cellplm'\] must be a dict .* it is a str"):
        check_slots(adata, [])


def test_files(counts, make_anndata, tmp_path):
    """Slots are written in memory, the file stays; a view of a file cannot be written to."""
    path = tmp_path / "cells.h5ad"
    make_anndata(sparse.csr_matrix(counts)).write_h5ad(path)
    content = path.read_bytes()
    adata = ad.read_h5ad(path, backed="r")
    write_slots(adata, {("obsm", "X_test"): np.ones((37, 2))}, RECORD, "X_test")
    assert adata.obsm["X_test"].all()
    with pytest.raises(InputError, match=r"a view of a backed file.* adata\.to_memory\(\)"):
        write_slots(adata[:5], {("obsm", "X_test"): np.ones((5, 2))}, RECORD, "X_test")
    adata.file.close()
    assert path.read_bytes() == content


# -------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Options:
    strategy: str
    patience: int | None = None


MODEL = SimpleNamespace(name="mini", sha256="ab" * 32)


def record_of(adata: ad.AnnData, cells: Any = None, **more: Any) -> dict[str, Any]:
    return build_record(
        "embed",
        model=MODEL,
        parameters={
            "layer": None,
            "path": Path("a/b"),
            "reference": adata,
            "random_state": 2**70,
            "train": Options("head"),
            "genes": ["CD3E", "MS4A1"],
            "key": print,
            "copy": False,
        },
        cells=cells or read_cells(adata, adata.var_names.tolist(), batch_key="sample"),
        device="cpu",
        precision="fp32",
        random_state=np.random.default_rng(0),
        seconds=1.5,
        **more,
    )


def test_record(adata):
    record = record_of(adata, known=np.float32(0.25), table=pd.DataFrame({"a": [1.0]}), none=None)
    assert record["tool"] == "embed"
    assert record["package_version"].startswith("0.")
    assert record["model"] == {"name": "mini", "sha256": "ab" * 32}
    assert record["parameters"].pop("genes").tolist() == ["CD3E", "MS4A1"]
    assert record["parameters"] == {
        "path": "a/b",
        "reference": "AnnData 37 × 113",
        "random_state": str(2**70),
        "train": {"strategy": "head"},
        "key": "builtin_function_or_method",
        "copy": False,
    }
    assert record["slots_read"].tolist() == ["X", "obs['sample']"]
    assert record["input"]["kind"] == "counts"
    assert record["genes"]["n_used"] == 113
    assert record["contexts"]["n_contexts"] == 3
    assert record["contexts"]["names"].tolist() == ["a", "b", "c"]
    assert record["contexts"]["sizes"].tolist() == [12, 13, 12]
    assert (record["device"], record["precision"], record["seconds"]) == ("cpu", "fp32", 1.5)
    assert record["random_state"] == "Generator"
    assert type(record["known"]) is float
    assert "none" not in record


def test_record_tells_of_cells_without_counts(counts, make_anndata):
    adata = make_anndata(np.repeat(counts, 30, axis=0))
    adata.X[40] += 0.5
    cells = read_cells(adata, adata.var_names.tolist())
    with pytest.warns(CountsWarning):
        cells.counts(slice(None))
    assert record_of(adata, cells)["input"]["n_cells_without_counts"] == 1


@pytest.mark.parametrize("bad", [object(), {"a/b": 1}, [None, "a"], {1, 2}, 1j])
def test_what_a_record_cannot_keep_is_a_mistake_of_the_tool(bad, adata):
    with pytest.raises(TypeError, match=r"record\['more'\]"):
        record_of(adata, more=bad)


@pytest.mark.parametrize("n_cells", [37, 0])
def test_all_of_it_survives_a_file(n_cells, adata, tmp_path):
    adata = adata[:n_cells].copy()
    slots = {("obsm", "X_test"): np.ones((n_cells, 2)), ("obs", "label"): ["a"] * n_cells}
    record = record_of(adata, frame=pd.DataFrame({"r": [0.5]}, index=["CD3E"]), share=0.5)
    write_slots(adata, slots, record, "X_test")
    for write, read, name in (
        (ad.AnnData.write_h5ad, ad.read_h5ad, "cells.h5ad"),
        (ad.AnnData.write_zarr, ad.read_zarr, "cells.zarr"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's, about what it turns into categories
            write(adata, tmp_path / name)
            found = read(tmp_path / name).uns["cellplm"]["X_test"]
        assert flat(found) == flat(record)


def flat(value: Any) -> Any:
    """Give a record with arrays as lists, to be compared."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, pd.DataFrame):
        return value.to_dict()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
