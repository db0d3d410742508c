"""Inference block by block against the whole context in one call, within the memory budget."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cellplm_tl as cp
from cellplm_tl import _anndata, _genes, _inference
from cellplm_tl._errors import OptionError
from cellplm_tl._inference import ContextSums, blocks, encode, read_block
from cellplm_tl.models import CellPLM, CellPLMConfig

SPECTRUM = {"embedder": "spectrum", "factors": 12, "latent_size": 12}
NETWORKS = {
    "release": {"latent": "mixture_release", "positions": "none"},
    "paper": {"latent": "mixture"},
    "spectrum": SPECTRUM,
    "spectrum alone": {
        **SPECTRUM,
        "hidden": 12,
        "encoder": "none",
        "latent": "none",
        "decoder": "none",
    },
    "unit length": {**SPECTRUM, "unit_length": True, "target_sum": "panel"},
    "w/o attention": {"encoder": "mlp", "latent": "gaussian"},
    "w/o latent": {"latent": "none", "latent_size": 32},
}
RELATIVE = 1e-5  # of the largest value: what the cut into blocks may change
ARRAYS = ("latent", "factors", "explained", "total")


@pytest.fixture(scope="module")
def gene_ids(_pbmc) -> tuple[str, ...]:
    ids = _genes.resolve(_pbmc.var_names).gene_ids
    return tuple(np.unique(ids[ids != ""])[:600])


@pytest.fixture(scope="module")
def make_network(gene_ids):
    """Make a small network, each time the same."""

    def make(name: str = "paper", **changes) -> CellPLM:
        generator = torch.Generator().manual_seed(0)
        sizes = {"hidden": 32, "heads": 4, "encoder_layers": 2, "latent_size": 8}
        config = CellPLMConfig(genes=gene_ids, **{**sizes, **NETWORKS[name], **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = CellPLM(config).eval()
        if config.embedder == "spectrum":
            embedder = network.embedder
            embedder.loadings.normal_(std=0.05, generator=generator)
            embedder.eigenvalues.uniform_(1, 20, generator=generator)
            embedder.scale.uniform_(0.5, 2, generator=generator)
        if name in ("spectrum", "unit length"):
            network.latent.mean.weight.data.normal_(std=0.1, generator=generator)  # else 0
        return network

    return make


@pytest.fixture
def adata(pbmc_counts) -> ad.AnnData:
    """Give real counts in two samples whose rows alternate, with coordinates for most cells."""
    adata = pbmc_counts[:300].copy()
    rng = np.random.default_rng(0)
    adata.obs["sample"] = rng.choice(["a", "b"], 300, p=[0.7, 0.3])
    adata.obsm["spatial"] = rng.uniform(0, 1000, (300, 2))
    adata.obsm["spatial"][::7] = np.nan
    return adata


@pytest.fixture
def make_cells(gene_ids):
    def make(adata, **parameters):
        return _anndata.read_cells(adata, gene_ids, **{"batch_key": "sample", **parameters})

    return make


def whole(network, cells):
    """Encode each context in one call of the network."""
    results = {}
    genes = torch.from_numpy(cells.gene_index)
    for rows in cells.contexts:
        coordinates = cells.coordinates
        with torch.no_grad():
            encoded = network(
                read_block(cells, rows),
                genes,
                None if coordinates is None else torch.from_numpy(coordinates[rows]),
            )
        values = {"latent": encoded.posterior.mean, **encoded._asdict()}
        for name in ARRAYS:
            if values[name] is not None:
                shape = (cells.n_cells, *values[name].shape[1:])
                results.setdefault(name, np.full(shape, np.nan, np.float32))
                results[name][rows] = values[name].numpy()
    return results


def assert_same(encoding, expected, relative=RELATIVE):
    for name in ARRAYS:
        values = getattr(encoding, name)
        assert (values is None) == (expected.get(name) is None)
        if values is not None:
            assert values.dtype == np.float32
            atol = relative * np.abs(expected[name]).max()
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=atol)


def as_dict(encoding):
    return {name: getattr(encoding, name) for name in ARRAYS}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_give_what_the_whole_context_gives(
    name, make_network, adata, make_cells, monkeypatch
):
    network, cells = make_network(name), make_cells(adata)
    expected = whole(network, cells)
    assert_same(encode(network, cells), expected)
    monkeypatch.setitem(_inference.BLOCK_CELLS, "cpu", 17)
    assert_same(encode(network, cells), expected)


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    block_cells=st.integers(1, 80),
    budget=st.sampled_from([1, 10_000, 20_000, 40_000, 10**9]),
)
@hypothesis_settings(max_examples=30)
def test_neither_blocks_nor_budget_change_a_result(
    name, block_cells, budget, make_network, shared_cells, whole_results
):
    """Budgets from "all in a file, nothing kept" over parts of it to "all in memory"."""
    with pytest.MonkeyPatch.context() as patch, cp.settings.override(memory_budget=budget):
        patch.setattr(_inference, "_block_cells", lambda *_: block_cells)
        encoding = encode(make_network(name), shared_cells)
    assert_same(encoding, whole_results(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_do_not_change_a_result(name, make_network, shared_cells, whole_results):
    before = torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            encoding = encode(make_network(name), shared_cells)
        finally:
            torch.set_num_threads(before)
        assert_same(encoding, whole_results(name))


@pytest.fixture(scope="module")
def shared_cells(_pbmc, gene_ids):
    adata = _pbmc[:75].copy()
    adata.X = np.rint(np.expm1(adata.X.toarray()))
    adata.obs["sample"] = np.repeat(["a", "b"], [60, 15])
    return _anndata.read_cells(adata, gene_ids, batch_key="sample")


@pytest.fixture(scope="module")
def whole_results(make_network, shared_cells):
    results = {}

    def of(name):
        if name not in results:
            results[name] = whole(make_network(name), shared_cells)
        return results[name]

    return of


def test_sums_are_added_up_in_float64():
    """2^24 + 1 is not a float32: a hundred small blocks would vanish beside a large one."""

    def part(number, block, before):
        assert all(tensor.dtype == torch.float32 for tensor in before)
        return (torch.tensor(2.0**24 if block == 0 else 1.0),)

    total, again = _inference._add_up(2, lambda: iter(enumerate(range(101))), part)
    assert total == again == 2.0**24 + 100


def test_another_context_changes_nothing(make_network, adata, make_cells):
    network = make_network()
    expected = encode(network, make_cells(adata)).latent
    in_a = (adata.obs["sample"] == "a").to_numpy()
    counts = adata.X.toarray()
    counts[~in_a] = counts[~in_a][::-1] * 2
    adata.X = counts
    latent = encode(network, make_cells(adata)).latent
    np.testing.assert_array_equal(latent[in_a], expected[in_a])
    assert not np.allclose(latent[~in_a], expected[~in_a])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n_cells", [0, 1])
def test_no_cell_and_one_cell(name, n_cells, make_network, adata, make_cells):
    network = make_network(name)
    few = make_cells(adata[:n_cells].copy())
    encoding = encode(network, few)
    assert encoding.latent.shape == (n_cells, network.config.latent_size)
    assert np.isfinite(encoding.latent).all()


def test_cells_without_counts(make_network, adata, make_cells):
    adata.X = np.concatenate((np.zeros((5, adata.n_vars)), adata.X[5:].toarray()))
    for name in NETWORKS:
        assert np.isfinite(encode(make_network(name), make_cells(adata)).latent).all()


def test_the_same_twice_and_the_network_untouched(make_network, adata, make_cells):
    network, cells = make_network().train(), make_cells(adata)
    before = copy.deepcopy(network.state_dict())
    first = encode(network, cells).latent
    with cp.settings.override(precision="bf16"):
        encode(network, cells)
    np.testing.assert_array_equal(encode(network, cells).latent, first)
    assert network.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert first.shape == (300, 8)
    np.testing.assert_array_equal(first, encode(network.eval(), cells).latent)


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_is_close(name, make_network, adata, make_cells):
    network, cells = make_network(name), make_cells(adata)
    full = encode(network, cells).latent
    with cp.settings.override(precision="bf16"):
        half = encode(network, cells).latent
    deviation = np.linalg.norm(half - full) / np.linalg.norm(full - full.mean(0))
    assert deviation < 0.05
    has_products = name != "spectrum alone"
    assert (deviation > 1e-4) == has_products


# --- sums that are given --------------------------------------------------------------------------

SUMS = {  # of a layer of 4 heads of 8: n, K, Q, K', Q', Z, M
    "flow": [(), (4, 8), (4, 8), (4, 8), (4, 8), (4,), (4, 8, 8)],
    "mlp": [],
}


def stored(network, cells, encoding, number: int) -> ContextSums:
    """Give the sums of one context as they are stored: those of the embedder over all genes."""
    embedder = []
    for total in encoding.context_sums[number]:
        if total.ndim:
            on_all = torch.full((network.config.n_genes,), float("nan"))  # not to be looked at
            on_all[torch.from_numpy(cells.gene_index)] = total
            total = on_all
        embedder.append(total)
    return ContextSums(tuple(embedder), encoding.layer_sums[number])


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_of_layers_are_kept_where_asked_for(name, make_network, adata, make_cells):
    network, cells = make_network(name), make_cells(adata)
    n_layers = len(network.encoder)
    plain, keeping = encode(network, cells), encode(network, cells, keep_layer_sums=True)
    assert_same(keeping, as_dict(plain))
    assert plain.layer_sums == ((), ())
    assert len(keeping.layer_sums) == len(cells.contexts) == 2
    assert len(keeping.context_sums) == len(plain.context_sums) == 2
    for rows, layers in zip(cells.contexts, keeping.layer_sums, strict=True):
        assert len(layers) == n_layers
        for sums in layers:
            assert [tuple(total.shape) for total in sums] == SUMS[network.config.encoder]
            assert all(total.dtype == torch.float32 for total in sums)
            assert not sums or sums[0] == len(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_context_s_own_sums_give_what_it_gives(
    name, make_network, adata, make_cells, monkeypatch
):
    """Each context by itself, whole, in part and in small blocks."""
    network, cells = make_network(name), make_cells(adata, spatial_key=None)
    expected = encode(network, cells, keep_layer_sums=True)
    for number, rows in enumerate(cells.contexts):
        sums = stored(network, cells, expected, number)
        of_context = {
            key: None if value is None else value[rows] for key, value in as_dict(expected).items()
        }
        part = make_cells(adata[rows].copy(), batch_key=None, spatial_key=None)
        again = encode(network, part, stored=sums, keep_layer_sums=True)
        assert_same(again, of_context)
        for used, wanted in zip(
            (again.context_sums[0], *again.layer_sums[0]),
            (expected.context_sums[number], *sums.layers),
            strict=True,
        ):
            assert all(torch.equal(one, other) for one, other in zip(used, wanted, strict=True))
        few = make_cells(adata[rows[5:25]].copy(), batch_key=None, spatial_key=None)
        of_few = {key: None if v is None else v[5:25] for key, v in of_context.items()}
        with monkeypatch.context() as patch:
            patch.setattr(_inference, "_block_cells", lambda *_: 3)
            with cp.settings.override(memory_budget=1):
                assert_same(encode(network, few, stored=sums), of_few)


@pytest.mark.parametrize("name", ["paper", "spectrum"])
def test_sums_of_others_change_a_cell(name, make_network, adata, make_cells):
    network, cells = make_network(name), make_cells(adata, spatial_key=None)
    own = encode(network, cells, keep_layer_sums=True)
    of_first = encode(network, cells, stored=stored(network, cells, own, 0))
    first, second = cells.contexts
    scale = np.abs(own.latent).max()
    np.testing.assert_allclose(of_first.latent[first], own.latent[first], atol=1e-5 * scale)
    assert np.abs(of_first.latent[second] - own.latent[second]).max() > 1e-3 * scale


def test_sums_that_are_given_save_their_sweeps(make_network, adata, make_cells):
    network, cells = make_network("spectrum"), make_cells(adata, batch_key=None)
    own = stored(network, cells, encode(network, cells, keep_layer_sums=True), 0)
    for sums, n_sweeps in ((None, (1 + 1) + 2 * (3 + 1) + 1), (own, 1 + 2 + 1)):
        told = []
        encode(network, cells, stored=sums, bar=SimpleNamespace(update=told.append))
        assert told == pytest.approx([300 / n_sweeps] * n_sweeps)


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path):
    """Give the directory for scratch files of the test."""
    with cp.settings.override(scratch_dir=tmp_path):
        yield tmp_path


@pytest.fixture
def mapped(monkeypatch):
    """Collect the scratch files that are made."""
    files = []

    def make(**kwargs):
        files.append(kwargs["dir"])
        return real(**kwargs)

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", make)
    return files


def test_hidden_states_past_the_budget_go_to_a_file(
    make_network, adata, make_cells, scratch, mapped, caplog
):
    network, cells = make_network(), make_cells(adata)
    expected = as_dict(encode(network, cells))
    assert not mapped
    with caplog.at_level(logging.INFO, "cellplm_tl"), cp.settings.override(memory_budget="30kB"):
        assert_same(encode(network, cells), expected)
    assert mapped == [scratch]
    assert str(scratch) in caplog.text
    assert list(scratch.iterdir()) == []


def test_an_interrupt_leaves_no_file_and_the_settings(
    make_network, adata, make_cells, scratch, mapped, monkeypatch
):
    network, cells = make_network(), make_cells(adata)
    seen = []

    def interrupt(self, u):
        seen.append(list(scratch.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr("cellplm_tl.models.encoder.FlowLayer.begin", interrupt)
    with cp.settings.override(memory_budget="30kB"), pytest.raises(KeyboardInterrupt):
        encode(network, cells)
    assert mapped
    assert seen == [[]]  # the file has no name even while it is used
    assert list(scratch.iterdir()) == []
    assert not torch.is_inference_mode_enabled()


def test_no_room_for_the_file(make_network, adata, make_cells, scratch, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    message = r"hidden states of \d+ cells .*scratch_dir .*Name a directory"
    with (
        cp.settings.override(memory_budget="30kB"),
        pytest.raises(OptionError, match=message),
    ):
        encode(make_network(), make_cells(adata))


def test_what_fits_is_kept_and_not_computed_again(make_network, adata, make_cells, monkeypatch):
    """A layer begins a cell once where the budget allows, else once in each of its four sweeps."""
    from cellplm_tl.models.encoder import FlowLayer

    network, cells = make_network(), make_cells(adata)
    begun = []
    real = FlowLayer.begin
    monkeypatch.setattr(FlowLayer, "begin", lambda self, u: begun.append(len(u)) or real(self, u))
    monkeypatch.setattr(_inference, "_block_cells", lambda *_: 16)
    encode(network, cells)
    assert sum(begun) == 2 * 300
    begun.clear()
    with cp.settings.override(memory_budget=1):
        encode(network, cells)
    assert sum(begun) == 2 * 300 * 4
    begun.clear()
    largest = max(map(len, cells.contexts))
    enough_for_half = (largest * 32 * 4 + largest // 2 * 3 * 32 * 4 + 300 * 8 * 4) / 0.65
    with cp.settings.override(memory_budget=enough_for_half):
        encode(network, cells)
    assert 2 * 300 < sum(begun) < 2 * 300 * 4


MEASURE = """
import sys, threading, time
import numpy as np, torch
from types import SimpleNamespace
import cellplm_tl as cp
from cellplm_tl import _inference
from cellplm_tl._anndata import CountBlock
from cellplm_tl.models import CellPLM, CellPLMConfig

torch.set_num_threads(1)
genes = tuple(f"ENSG{i:011d}" for i in range(100))
network = CellPLM(CellPLMConfig(genes=genes, hidden=256, heads=4, encoder_layers=1, latent_size=4,
                                positions="none", decoder="none")).eval()

def cells(n):
    rng = np.random.default_rng(0)

    def counts(rows):
        n = len(rows)
        columns = np.tile(np.arange(0, 100, 10, dtype=np.int32), n)
        values = rng.integers(1, 9, 10 * n).astype(np.float32)
        return CountBlock(values, columns, np.arange(n + 1, dtype=np.int32) * 10, np.full(n, 50.0))

    return SimpleNamespace(n_cells=n, genes=np.array(genes), gene_index=np.arange(100),
                           contexts=(np.arange(n),), coordinates=None, counts=counts)

def anonymous():  # bytes that are no file's: pages of the scratch file can go at any time
    rows = dict(r.split(":") for r in open("/proc/self/status").read().splitlines() if ":" in r)
    return 1024 * int(rows["RssAnon"].split()[0])

def peak(n):
    stop, seen = threading.Event(), [anonymous()]
    def watch():
        while not stop.wait(0.002):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    _inference.encode(network, cells(n))
    stop.set()
    thread.join()
    return max(seen) - seen[0]

with cp.settings.override(memory_budget=sys.argv[1], scratch_dir=sys.argv[2]):
    peak(1000)  # libraries, heap
    print(peak(1000), peak(10_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_set_by_the_budget_and_not_by_the_cells(tmp_path):
    """The hidden states alone of 10,000 cells are 10 MB, with queries, keys, values 41 MB."""
    command = [sys.executable, "-c", MEASURE, "6MB", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert few < 6e6
    assert many < 6e6


def test_blocks_cover_every_cell_once(make_network, adata, make_cells):
    network, cells = make_network(), make_cells(adata)
    with cp.settings.override(memory_budget="2MB"):
        found = list(blocks(cells, network))
    assert len(found) > 2
    for number, rows in found:
        assert set(rows) <= set(cells.contexts[number])
    assert sorted(np.concatenate([rows for _, rows in found])) == list(range(300))


def test_counts_are_read_as_they_are_and_never_written_to(adata, make_cells):
    cells = make_cells(adata, batch_key=None)
    counts = read_block(cells, np.arange(300))
    block = cells.counts(slice(0, 300))
    np.testing.assert_array_equal(counts.values, block.values)
    np.testing.assert_array_equal(counts.columns, block.columns)
    np.testing.assert_array_equal(counts.offsets, block.offsets)
    np.testing.assert_allclose(counts.library_size, block.library_size, rtol=1e-6)


def test_only_arrays_that_are_read_only_are_copied():
    block = _anndata.CountBlock(
        np.ones(3, np.float32), np.arange(3), np.array([0, 1, 3]), np.ones(2)
    )
    block.values.flags.writeable = False
    counts = read_block(SimpleNamespace(counts=lambda rows: block), np.arange(2))
    counts.values[0] = 7  # in place
    assert block.values[0] == 1
    assert counts.columns.data_ptr() == block.columns.ctypes.data


# --- the bar --------------------------------------------------------------------------------------


def test_one_bar_that_counts_cells(make_network, adata, make_cells, capsys):
    with cp.settings.override(progress=True):
        encode(make_network(), make_cells(adata))
    bar = capsys.readouterr().err
    assert "100%" in bar
    assert "300/300" in bar
    assert "cells" in bar
    encode(make_network(), make_cells(adata))
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gpu_gives_the_same(name, make_network, adata, make_cells):
    network, cells = make_network(name), make_cells(adata)
    expected = as_dict(encode(network, cells, device=torch.device("cpu")))
    assert_same(encode(network, cells, device=torch.device("cuda")), expected, relative=1e-4)
