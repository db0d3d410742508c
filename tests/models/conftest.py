"""Golden data and small contexts for the tests of the network."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from cellplm_tl import _weights
from cellplm_tl.models import CellPLM, CellPLMConfig, Counts

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

# Golden values are float32; an independent float64 computation differs from them by up to 3e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden():
    """Read the arrays of a golden file by name."""
    return _arrays


@pytest.fixture(scope="session")
def release_tensors():
    """Read the tensors of a golden checkpoint, under their names in the release."""

    def read(layout: str) -> dict[str, torch.Tensor]:
        path = GOLDEN / f"golden_{layout}.best.ckpt"
        return torch.load(path, weights_only=True)["model_state_dict"]

    return read


@pytest.fixture
def golden_network():
    """Load the network of a golden checkpoint."""
    return lambda layout: _weights.load(GOLDEN / f"golden_{layout}.best.ckpt").network


@pytest.fixture(scope="session")
def assert_close():
    """Compare a tensor or an array with golden or float64 values."""

    def check(actual, expected, **tolerance) -> None:
        actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
        expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, **{**CLOSE, **tolerance})

    return check


@pytest.fixture(scope="session")
def to_counts():
    """Make Counts of a dense matrix (cells, genes)."""

    def make(dense: np.ndarray, library_size=None, dtype=torch.float32) -> Counts:
        rows, columns = np.nonzero(dense)
        offsets = np.searchsorted(rows, np.arange(dense.shape[0] + 1))
        if library_size is None:
            library_size = dense.sum(1)
        return Counts(
            values=torch.tensor(dense[rows, columns], dtype=dtype),
            columns=torch.tensor(columns),
            offsets=torch.tensor(offsets),
            library_size=torch.tensor(np.asarray(library_size), dtype=dtype),
        )

    return make


@pytest.fixture(scope="session")
def random_counts():
    """Draw a dense matrix (cells, genes) of counts, many of them zero; no cell is empty."""

    def draw(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        counts = rng.poisson(rng.gamma(0.8, 3.0, (1, n_genes)) * rng.gamma(2.0, 0.5, (n_cells, 1)))
        counts[:, 0] += 1
        return counts.astype(np.float64)

    return draw


@pytest.fixture
def make_network():
    """Build a small network, every weight drawn at random, from the fields that differ.

    Nothing starts at zero or at one, so that no part of it can hide behind its initial value.
    """

    def make(n_genes: int = 40, seed: int = 0, **fields) -> CellPLM:
        small = {
            "hidden": 16,
            "heads": 4,
            "encoder_layers": 2,
            "latent_size": 8,
            "components": 5,
            "decoder_hidden": 12,
            "dropout": 0.0,
            "genes": tuple(f"ENSG{i:011d}" for i in range(n_genes)),
        }
        torch.manual_seed(seed)
        network = CellPLM(CellPLMConfig(**{**small, **fields}))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            if network.config.embedder == "spectrum":
                factors = network.config.factors
                network.embedder.loadings.normal_(std=network.config.n_genes**-0.5)
                network.embedder.eigenvalues.copy_(torch.linspace(3.0, 0.5, factors))
                network.embedder.scale.uniform_(0.3, 1.5)
                network.embedder.pool_profile.uniform_(0.5, 1.0)
                network.embedder.pool_profile.div_(network.embedder.pool_profile.sum())
        return network.eval()

    return make
