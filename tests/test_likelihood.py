"""Expectations and quantiles of a negative binomial, against scipy's sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expi
from scipy.stats import nbinom, poisson

from cellplm_tl._likelihood import expected_log1p, quantile, seen_probability

MEANS = np.array([0.0, 1e-4, 0.03, 0.7, 4.0, 25.0, 90.0, 300.0, 2000.0])
THETAS = np.array([0.05, 0.5, 3.0, 40.0, 1e4])
SCALES = np.array([0.05, 1.0, 20.0])


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Every mean (cells) with every inverse dispersion (genes)."""
    mean = np.repeat(MEANS[:, None], len(THETAS), 1)
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(THETAS, dtype=torch.float32)


def by_sum(mean: float, theta: float, scale: float) -> float:
    if mean == 0:
        return 0.0
    distribution = nbinom(theta, theta / (theta + mean))
    k = np.arange(int(distribution.ppf(1 - 1e-12)) + 2)
    return float((distribution.pmf(k) * np.log1p(scale * k)).sum())


@pytest.mark.parametrize("scale", SCALES)
def test_expected_log1p_is_the_sum(scale):
    mean, theta = grid()
    found = expected_log1p(mean, theta, torch.full((len(mean),), scale))
    expected = [[by_sum(m, r, scale) for r in THETAS] for m in MEANS]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)
    assert found.dtype == torch.float32
    assert (found[0] == 0).all()


def test_each_cell_has_its_scale_and_each_gene_its_dispersion():
    mean = torch.tensor([[0.5, 90.0], [3.0, 0.2], [400.0, 7.0]])
    theta, scale = torch.tensor([0.3, 8.0]), torch.tensor([0.1, 2.0, 30.0])
    found = expected_log1p(mean, theta, scale)
    for i in range(3):
        for j in range(2):
            values = (float(t) for t in (mean[i, j], theta[j], scale[i]))
            assert float(found[i, j]) == pytest.approx(by_sum(*values), rel=2e-4, abs=1e-4)


def test_it_is_below_the_log_of_the_expectation():
    mean, theta = grid()
    found = expected_log1p(mean, theta, torch.full((len(mean),), 5.0))
    assert (found[1:] < torch.log1p(5 * mean[1:])).all()


def test_small_means_keep_their_relative_size():
    """For m → 0 the expectation is P(X = 1) log(1 + s), of a count that hardly ever is 2."""
    mean = torch.tensor([[1e-9], [1e-7], [1e-5]])
    found = expected_log1p(mean, torch.tensor([1e4]), torch.full((3,), 10.0))
    np.testing.assert_allclose(found, mean.numpy() * np.log(11), rtol=1e-4)


def test_a_huge_inverse_dispersion_is_a_poisson():
    mean = torch.tensor([[0.2, 6.0, 150.0]])
    theta = torch.full((3,), 1e7)
    k = np.arange(2000)
    expected = [(poisson(m).pmf(k) * np.log1p(k)).sum() for m in mean[0].numpy()]
    found = expected_log1p(mean, theta, torch.ones(1))
    np.testing.assert_allclose(found[0], expected, rtol=2e-4)
    np.testing.assert_array_equal(
        quantile(mean, theta, 0.95)[0], poisson.ppf(0.95, mean[0].numpy())
    )
    np.testing.assert_allclose(
        seen_probability(mean, theta)[0], -np.expm1(-mean[0].numpy()), rtol=1e-4
    )


def test_one_of_exponential_counts():
    """A geometric with a large mean is an exponential: E log(1 + x) = -e^(1/m) Ei(-1/m)."""
    found = expected_log1p(torch.tensor([[1e5]]), torch.ones(1), torch.full((1,), 1e-3))
    mean = 1e5 * 1e-3
    assert float(found) == pytest.approx(-np.exp(1 / mean) * expi(-1 / mean), rel=1e-3)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.5, 0.95, 0.999])
def test_quantiles_are_scipys(level):
    mean, theta = grid()
    found = quantile(mean, theta, level)
    expected = np.zeros(mean.shape)
    r, m = THETAS[None].astype(np.float32), MEANS[1:, None].astype(np.float32)
    expected[1:] = nbinom.ppf(level, r.astype(float), r / (r + m.astype(float)))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == torch.float32


def test_a_quantile_is_the_smallest_count_that_reaches_the_level():
    mean, theta = torch.tensor([[2.5, 30.0, 800.0]]), torch.tensor([0.7, 5.0, 100.0])
    found = quantile(mean, theta, 0.8)[0].numpy()
    distribution = nbinom(theta.numpy(), theta.numpy() / (theta.numpy() + mean[0].numpy()))
    assert (distribution.cdf(found) >= 0.8).all()
    assert (distribution.cdf(found - 1) < 0.8).all()


def test_seen_probability_is_one_less_that_of_zero():
    mean, theta = grid()
    expected = np.zeros(mean.shape)
    expected[1:] = nbinom.sf(0, THETAS[None], THETAS[None] / (THETAS[None] + MEANS[1:, None]))
    np.testing.assert_allclose(seen_probability(mean, theta), expected, rtol=2e-4)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_gives_nothing(shape):
    mean, theta = torch.zeros(shape), torch.ones(shape[1])
    assert expected_log1p(mean, theta, torch.ones(shape[0])).shape == shape
    assert quantile(mean, theta, 0.5).shape == shape
    assert seen_probability(mean, theta).shape == shape
