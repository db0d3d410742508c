"""The fast product against PyTorch's own, in values, gradients and number formats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cellplm_tl.models import linear as module
from cellplm_tl.models.linear import Linear, linear


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((37, 48), (24, 48), (24,))]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_float64(arrays, onednn, with_bias, monkeypatch):
    monkeypatch.setattr(module, "HAS_ONEDNN", module.HAS_ONEDNN and onednn)
    x, weight, bias = (t.clone().requires_grad_() for t in arrays)
    exact = [t.double().requires_grad_() for t in arrays]
    used = 3 if with_bias else 2
    result = linear(*(x, weight, bias)[:used])
    expected = F.linear(*exact[:used])
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.linspace(-1, 1, result.numel()).view(result.shape)
    result.backward(gradient)
    expected.backward(gradient.double())
    for single, double in list(zip((x, weight, bias), exact, strict=True))[:used]:
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_needed_are_computed(arrays):
    x, weight, bias = arrays
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(24, 48), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, w: (x.T.contiguous().T, w), id="transposed rows"),
        pytest.param(lambda x, w: (torch.cat((x, x), 1)[:, :48], w), id="rows of a wider matrix"),
        pytest.param(lambda x, w: (x, torch.cat((w, w), 1)[:, :48]), id="part of the weights"),
        pytest.param(lambda x, w: (x[:0], w), id="no cell"),
        pytest.param(lambda x, w: (x[:1], w), id="one cell"),
        pytest.param(lambda x, w: (x[0], w), id="a vector"),
        pytest.param(lambda x, w: (x.view(1, 37, 48), w), id="three axes"),
    ],
)
def test_any_form_of_the_input(arrays, change):
    x, weight = change(*arrays[:2])
    result = linear(x, weight, arrays[2])
    torch.testing.assert_close(result, F.linear(x, weight, arrays[2]), rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_mean_bfloat16_products_and_nothing_else(arrays):
    x, weight, bias = arrays
    result = linear(x, weight.bfloat16(), bias.bfloat16())
    assert result.dtype == torch.float32
    rounded = F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(result, rounded.float())
    assert not torch.allclose(result, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_autocast_is_obeyed(arrays):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*arrays).dtype == torch.bfloat16


def test_the_layer_is_a_linear_layer():
    torch.manual_seed(0)
    layer = Linear(48, 24)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, 48)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
