from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from cellplm_tl.models import CellPLMConfig
from cellplm_tl.models.encoder import make_encoder
from cellplm_tl.models.network import over_context

LAYOUTS = ["gmvae", "vae", "ae"]


def drive(layer, blocks: list[torch.Tensor]) -> torch.Tensor:
    """Run a layer over a context that is cut into blocks, as inference does."""
    begun = [layer.begin(u) for u in blocks]
    context: tuple[torch.Tensor, ...] = ()
    for number in range(layer.n_rounds):
        parts = [layer.sums(number, block, context) for block in begun]
        context = context + tuple(sum(part) for part in zip(*parts, strict=True))
    return torch.cat([layer.finish(block, context) for block in begun])


def random_encoder(**fields):
    """Make a float64 encoder, hidden 16, with random weights, in evaluation mode."""
    small = {"genes": ("a",), "hidden": 16, "heads": 4, "encoder_layers": 2, "decoder": "none"}
    torch.manual_seed(0)
    encoder = make_encoder(CellPLMConfig(**small, **fields)).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def layer_norm(u, weight, bias):
    centred = u - u.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weight + bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [0, 1])
def test_release_whole(layout, number, golden, golden_network, release_tensors, assert_close):
    arrays, layer = golden(f"forward_{layout}"), golden_network(layout).encoder[number]
    before = arrays["whole_embedder" if number == 0 else f"whole_layer{number - 1}"]
    u = torch.tensor(before)
    tensors, prefix = release_tensors(layout), f"encoder.layers.{number}.norm1"
    normed = F.layer_norm(u, u.shape[1:], tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"])
    assert_close(layer.attention(normed), arrays[f"whole_layer{number}_attn"], atol=2e-6)
    assert_close(over_context(layer, u), arrays[f"whole_layer{number}"], atol=5e-6)


@pytest.mark.parametrize("layout", ["gmvae", "vae"])
@pytest.mark.parametrize("number", [0, 1])
def test_release_per_context(layout, number, golden, golden_network, assert_close):
    arrays, layer = golden(f"forward_{layout}"), golden_network(layout).encoder[number]
    before = arrays["perbatch_embedder" if number == 0 else f"perbatch_layer{number - 1}"]
    for batch in np.unique(arrays["batch"]):
        cells = arrays["batch"] == batch
        after = over_context(layer, torch.tensor(before[cells]))
        assert_close(after, arrays[f"perbatch_layer{number}"][cells], atol=5e-6)
        # The cells of the other contexts do take part when they are there.
        whole = over_context(layer, torch.tensor(before))[cells]
        assert (whole - after).abs().max() > 1e-3


def test_flow_layer_against_numpy(assert_close):
    layer = random_encoder()[0]
    u = torch.randn(11, 16, dtype=torch.float64)
    state = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    normed = layer_norm(u.numpy(), state["norm1.weight"], state["norm1.bias"])
    after = u.numpy() + layer.attention(torch.tensor(normed)).detach().numpy()
    normed = layer_norm(after, state["norm2.weight"], state["norm2.bias"])
    wide = normed @ state["widen.weight"].T + state["widen.bias"]
    wide = wide * 0.5 * (1 + erf(wide / np.sqrt(2)))  # the exact GELU, 2 hidden wide
    expected = after + wide @ state["narrow.weight"].T + state["narrow.bias"]
    assert wide.shape == (11, 32)
    assert_close(over_context(layer, u), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["groupnorm", "layernorm"])
def test_mlp_layer_against_numpy(norm, assert_close):
    layer = random_encoder(encoder="mlp", norm=norm)[0]
    u = torch.randn(11, 16, dtype=torch.float64)
    state = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    t = u.numpy() @ state["linear.weight"].T + state["linear.bias"]
    t = np.where(t > 0, t, state["activation.weight"] * t)
    groups = t.reshape(11, 4 if norm == "groupnorm" else 1, -1)
    centred = groups - groups.mean(2, keepdims=True)
    t = (centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)).reshape(11, 16)
    expected = u.numpy() + t * state["norm.weight"] + state["norm.bias"]
    assert_close(over_context(layer, u), expected, rtol=1e-10, atol=1e-12)


def test_an_mlp_encoder_knows_no_context():
    layer = random_encoder(encoder="mlp")[0]
    u = torch.randn(11, 16, dtype=torch.float64)
    torch.testing.assert_close(over_context(layer, u)[:4], over_context(layer, u[:4]))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    kind=st.sampled_from(["flow", "mlp"]),
)
def test_blocks_do_not_matter(sizes, kind):
    layer = random_encoder(encoder=kind)[0]
    u = torch.randn(sum(sizes), 16, dtype=torch.float64)
    expected = over_context(layer, u)
    torch.testing.assert_close(drive(layer, list(u.split(sizes))), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_gradients_with_respect_to_the_input(kind):
    layer = random_encoder(encoder=kind)[0]
    u = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: over_context(layer, u), (u,))


@pytest.mark.parametrize(("kind", "n_layers"), [("flow", 2), ("mlp", 2)])
def test_number_of_layers(kind, n_layers):
    assert len(random_encoder(encoder=kind)) == n_layers


def test_dropout_acts_in_training_only():
    """At the rate of the model, on what each of the two blocks adds."""
    layer = random_encoder(dropout=0.5)[0]
    u = torch.randn(50, 16, dtype=torch.float64)
    assert torch.equal(over_context(layer, u), over_context(layer, u))
    layer.train()
    assert not torch.equal(over_context(layer, u), over_context(layer, u))
    with torch.no_grad():
        layer.narrow.weight.zero_()
        layer.narrow.bias.fill_(1.0)
        layer.attention.out.weight.zero_()
        layer.attention.out.bias.fill_(100.0)
    change = over_context(layer, u) - u
    # Attention adds 100 / 0.5 / 0.99 where it is kept, the feed-forward block 1 / 0.5.
    attention = change > 50
    feed_forward = change - attention * 200 / 0.99 > 1
    assert attention.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert feed_forward.double().mean().item() == pytest.approx(0.5, abs=0.06)
