from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from cellplm_tl.models import CellPLMConfig
from cellplm_tl.models.latent import LATENTS, clamp_through

N_CELLS, HIDDEN, LATENT, COMPONENTS = 13, 16, 6, 5


def random_latent(kind: str, **fields):
    """Make a float64 latent with random weights, in evaluation mode."""
    small = {"hidden": HIDDEN, "heads": 4, "latent_size": LATENT, "components": COMPONENTS}
    torch.manual_seed(0)
    config = CellPLMConfig(genes=("a",), latent=kind, decoder="none", **{**small, **fields})
    latent = LATENTS[kind](config).double().eval()
    with torch.no_grad():
        for parameter in latent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return latent


@pytest.fixture
def h():
    return torch.randn(
        N_CELLS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def noise(seed: int = 2) -> torch.Tensor:
    return torch.randn(
        N_CELLS, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


# --- the released mixture -------------------------------------------------------------------------


@pytest.fixture
def gmvae(golden, golden_network):
    return golden("forward_gmvae"), golden_network("gmvae").latent


@pytest.mark.parametrize("prefix", ["whole_", "perbatch_"])
def test_release_mixture_with_its_noise(prefix, gmvae, assert_close):
    arrays, latent = gmvae
    stored = {
        name.removeprefix(prefix): torch.tensor(value)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    posterior = latent(stored["pre_latent_norm"], uniform=stored["gm_uniform"])
    assert_close(posterior.logits, stored["gm_logits"], atol=3e-6)
    assert_close(posterior.logits.softmax(1), stored["gm_prob"], atol=3e-6)
    assert torch.equal(posterior.component, stored["gm_y"])
    assert_close(posterior.mean, stored["gm_mean"], atol=3e-6)
    assert_close(posterior.mean, stored["latent"], atol=3e-6)
    assert_close(posterior.variance, stored["gm_var"], atol=3e-6)
    assert_close(latent.sample(posterior, stored["gm_normal"]), stored["gm_sample"], atol=3e-6)


def test_release_mixture_with_other_noise(gmvae, assert_close):
    arrays, latent = gmvae
    uniform = torch.tensor(arrays["second_draw_gm_uniform"])
    posterior = latent(torch.tensor(arrays["whole_pre_latent_norm"]), uniform=uniform)
    assert posterior.component.tolist() == arrays["second_draw_gm_y"].tolist()
    assert_close(posterior.mean, arrays["second_draw_latent"], atol=3e-6)
    assert np.abs(arrays["second_draw_latent"] - arrays["whole_latent"]).max() > 0.3


def test_release_prior_of_the_mixture(gmvae, assert_close):
    arrays, latent = gmvae
    y = torch.tensor(arrays["whole_gm_y"])
    assert_close(latent.prior_mean(y), arrays["whole_gm_prior_mean"], atol=3e-6)
    variance = F.softplus(latent.prior_variance(y))
    assert_close(variance, arrays["whole_gm_prior_var"], atol=3e-6)


def test_without_noise_the_released_mixture_gives_its_expectation(gmvae, assert_close):
    """Of two ways to do without the release's random draws, the mean of what it draws is taken.

    The other one, the most probable component, jumps where two components are equally probable:
    neighbours end up apart although nothing in the network says so, and it is the mean of nothing.
    The expectation is a continuous function of the cell, and the release's own embeddings scatter
    around it.
    """
    arrays, latent = gmvae
    h = torch.tensor(arrays["whole_pre_latent_norm"])
    expected = arrays["derived_latent_expected"]
    assert_close(latent(h).mean, expected, atol=3e-6)
    assert torch.equal(latent(h).mean, latent(h).mean)
    assert np.abs(arrays["derived_latent_argmax"] - expected).max() > 0.1


def test_the_expectation_is_the_mean_over_draws(gmvae):
    arrays, latent = gmvae
    h = torch.tensor(arrays["whole_pre_latent_norm"][:3]).repeat_interleave(20_000, 0)
    uniform = torch.rand(len(h), 16, generator=torch.Generator().manual_seed(0))
    draws = latent(h, uniform=uniform).mean.view(3, 20_000, -1)
    error = (draws.mean(1) - latent(h[::20_000]).mean) / (draws.std(1) / math.sqrt(20_000))
    assert error.abs().max() < 4.5  # standard errors, the largest of 48


def test_while_training_the_component_is_soft(h):
    latent = random_latent("mixture_release").train()
    uniform = torch.rand(N_CELLS, COMPONENTS, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform))
    posterior = latent(h, uniform=uniform)
    expected = (latent.logits(h) + gumbel).softmax(1)
    torch.testing.assert_close(posterior.component, expected, rtol=1e-10, atol=1e-10)
    t = latent.join(torch.cat((h, expected), 1)).relu()
    torch.testing.assert_close(posterior.mean, latent.mean(t))
    torch.testing.assert_close(posterior.variance, F.softplus(latent.variance(t)))


def test_extreme_uniform_draws_stay_finite(h):
    uniform = torch.zeros(N_CELLS, COMPONENTS, dtype=torch.float64)
    uniform[:, 0] = 1.0
    posterior = random_latent("mixture_release").train()(h, uniform=uniform)
    assert posterior.component.isfinite().all()
    assert posterior.mean.isfinite().all()


def test_terms_of_the_released_mixture_against_torch(h):
    latent = random_latent("mixture_release").train()
    posterior = latent(h, uniform=torch.rand(N_CELLS, COMPONENTS, dtype=torch.float64))
    z = latent.sample(posterior, noise())
    y = posterior.component
    q = Normal(posterior.mean, (posterior.variance + 1e-8).sqrt())
    p = Normal(latent.prior_mean(y), (F.softplus(latent.prior_variance(y)) + 1e-8).sqrt())
    terms = latent.terms(posterior, z)
    expected = (q.log_prob(z) - p.log_prob(z)).sum(1)
    torch.testing.assert_close(terms["latent"], expected)
    entropy = Categorical(logits=posterior.logits).entropy()
    torch.testing.assert_close(terms["components"], math.log(COMPONENTS) - entropy)


# --- the Gaussian ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["whole_", "perbatch_"])
def test_release_gaussian(prefix, golden, golden_network, assert_close):
    arrays, latent = golden("forward_vae"), golden_network("vae").latent
    posterior = latent(torch.tensor(arrays[f"{prefix}pre_latent_norm"]))
    assert_close(posterior.mean, arrays[f"{prefix}latent"], atol=3e-6)
    assert_close(latent.sample(posterior, None), arrays[f"{prefix}latent"], atol=3e-6)
    if prefix == "whole_":
        assert_close(posterior.mean, arrays["whole_vae_mu"], atol=3e-6)
        raw = arrays["whole_vae_logvar_raw"].astype(np.float64)
        assert raw.min() < -5
        assert raw.max() > 5
        assert_close(posterior.variance, np.exp(np.clip(raw, -5, 5)) + 1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_posterior_and_sample(kind, h):
    latent = random_latent(kind)
    start = noise(5)
    posterior = latent(h)
    torch.testing.assert_close(posterior.mean, latent.mean(h))
    torch.testing.assert_close(latent(h, start).mean, start + latent.mean(h))
    expected = latent.log_variance(h).clamp(-5, 5).exp() + 1e-4
    torch.testing.assert_close(posterior.variance, expected)
    assert torch.equal(latent.sample(posterior, None), posterior.mean)
    z = latent.sample(posterior, noise())
    torch.testing.assert_close(z, posterior.mean + posterior.variance.sqrt() * noise())


def test_terms_of_the_gaussian_against_torch(h):
    latent = random_latent("gaussian")
    posterior = latent(h)
    q = Normal(posterior.mean, posterior.variance.sqrt())
    expected = kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0)).sum(1)
    terms = latent.terms(posterior, posterior.mean)
    assert list(terms) == ["latent"]
    torch.testing.assert_close(terms["latent"], expected)


# --- the mixture of appendix D --------------------------------------------------------------------


def component_distributions(latent) -> list[Independent]:
    deviation = (latent.prior_log_variance.clamp(-5, 5) / 2).exp()
    return [
        Independent(Normal(mean, sigma), 1)
        for mean, sigma in zip(latent.prior_mean, deviation, strict=True)
    ]


def test_terms_of_the_mixture_against_torch(h):
    """Equation (12): L_cond, the expectation over q(y|z) of KL(q(z|x) || p(z|y)), and L_Y."""
    latent = random_latent("mixture")
    posterior = latent(h)
    z = latent.sample(posterior, noise())
    q = Independent(Normal(posterior.mean, posterior.variance.sqrt()), 1)
    y = Categorical(logits=latent.assign(z))
    divergences = torch.stack(
        [kl_divergence(q, p.expand((N_CELLS,))) for p in component_distributions(latent)], 1
    )
    terms = latent.terms(posterior, z)
    torch.testing.assert_close(terms["latent"], (y.probs * divergences).sum(1))
    uniform = Categorical(probs=torch.ones(COMPONENTS, dtype=torch.float64))
    torch.testing.assert_close(terms["components"], kl_divergence(y, uniform))
    torch.testing.assert_close(latent.components(z), y.probs)


def test_terms_of_the_mixture_are_divergences(h):
    """Never negative; zero where posterior and prior are the same."""
    latent = random_latent("mixture")
    posterior = latent(h)
    terms = latent.terms(posterior, posterior.mean)
    assert (terms["latent"] > 0).all()
    assert (terms["components"] > 0).all()
    with torch.no_grad():
        latent.prior_mean.copy_(posterior.mean[0].expand_as(latent.prior_mean))
        latent.prior_log_variance.copy_(
            posterior.variance[0].log().expand_as(latent.prior_log_variance)
        )
        latent.assign.weight.zero_()
        latent.assign.bias.zero_()
    terms = latent.terms(posterior, posterior.mean)
    assert terms["latent"][0].abs() < 1e-10
    assert terms["latent"][1] > 0.1
    assert terms["components"].abs().max() < 1e-12


def test_mixture_terms_of_extreme_variances(h):
    """Beyond the bounds on log variances the terms are those at the bounds, and keep a gradient."""
    latent = random_latent("mixture")
    with torch.no_grad():
        latent.prior_log_variance[0] = 80.0
        latent.prior_log_variance[1] = -80.0
        latent.log_variance.bias[0] = 90.0
    posterior = latent(h)
    terms = latent.terms(posterior, posterior.mean)
    q = Independent(Normal(posterior.mean, posterior.variance.sqrt()), 1)
    divergences = torch.stack(
        [kl_divergence(q, p.expand((N_CELLS,))) for p in component_distributions(latent)], 1
    )
    y = latent.components(posterior.mean)
    torch.testing.assert_close(terms["latent"], (y * divergences).sum(1))
    terms["latent"].sum().backward()
    for parameter in (latent.prior_log_variance, latent.log_variance.bias):
        assert parameter.grad.isfinite().all()
        assert (parameter.grad[:2] != 0).all()


def test_placed_components_and_bayes_rule(h):
    """q(y|z) starts as the posterior of the component under the prior that the clusters make."""
    latent = random_latent("mixture")
    centres = torch.randn(COMPONENTS, LATENT, dtype=torch.float64)
    variance = torch.linspace(0.2, 2.0, LATENT, dtype=torch.float64)
    latent.place_components(centres, variance)
    z = noise()
    log_density = torch.stack([p.log_prob(z) for p in component_distributions(latent)], 1)
    torch.testing.assert_close(latent.components(z), log_density.softmax(1))
    densities = Independent(Normal(centres, variance.sqrt()), 1).log_prob(z[:, None])
    torch.testing.assert_close(log_density, densities)


# --- the plain ones, and what all have in common --------------------------------------------------


def test_release_linear(golden, golden_network, assert_close):
    arrays, latent = golden("forward_ae"), golden_network("ae").latent
    posterior = latent(torch.tensor(arrays["whole_pre_latent_norm"]))
    assert_close(posterior.mean, arrays["whole_latent"], atol=3e-6)
    assert latent.terms(posterior, posterior.mean) == {}
    assert torch.equal(latent.sample(posterior, noise()), posterior.mean)


def test_no_latent_hands_the_hidden_vector_on(h):
    latent = random_latent("none", latent_size=HIDDEN)
    assert torch.equal(latent(h).mean, h)
    assert torch.equal(latent(h, h).mean, 2 * h)
    assert list(latent.parameters()) == []


@pytest.mark.parametrize("kind", ["mixture", "mixture_release", "gaussian", "linear"])
def test_gradients_reach_every_parameter(kind, h):
    latent = random_latent(kind).train()
    uniform = torch.rand(N_CELLS, COMPONENTS, dtype=torch.float64)
    draws = {"uniform": uniform} if kind == "mixture_release" else {}
    posterior = latent(h, **draws)
    z = latent.sample(posterior, noise())
    (z.square().sum() + sum(term.sum() for term in latent.terms(posterior, z).values())).backward()
    for name, parameter in latent.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_initial_components_are_distinct_and_inside_a_unit_prior():
    config = CellPLMConfig(genes=("a",), components=16, latent_size=512)
    torch.manual_seed(0)
    latent = LATENTS["mixture"](config)
    assert latent.prior_mean.std().item() == pytest.approx(0.5, rel=0.03)
    assert (latent.prior_log_variance == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamp_lets_the_gradient_through(dtype):
    x = torch.tensor([-1e30, -200.0, -5.1, 0.3, 5.1, 1e8, 1e30], dtype=dtype, requires_grad=True)
    clamped = clamp_through(x, -5.0, 5.0)
    assert torch.equal(clamped, x.detach().clamp(-5.0, 5.0))  # to the last bit
    clamped.sum().backward()
    assert x.grad.tolist() == [1.0] * 7
