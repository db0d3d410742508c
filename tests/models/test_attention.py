from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_tl.models.attention import FlowAttention

E = 1e-6


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def literal_flow_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head, cell by cell, with the matrix (cells, cells) that is never made elsewhere.

    q, k (cells, head_dim) after the sigmoid, v (cells, head_dim); float64.
    """
    n = len(q)
    flow = (q + E) @ (k.sum(0) + E)  # inflow of each sink
    spread = (k + E) @ (q.sum(0) + E)  # outflow of each source
    a, b = 1 / flow, 1 / spread
    conserved_sink = (q + E) @ ((k * b[:, None]).sum(0) + E)
    conserved_source = np.clip((k + E) @ ((q * a[:, None]).sum(0) + E), -1, 1)
    allocation = sigmoid(conserved_sink)
    competition = n * np.exp(conserved_source) / np.exp(conserved_source).sum()
    weights = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            weights[i, j] = allocation[i] * a[i] * (q[i] @ k[j]) * competition[j]
    return weights @ v


def set_linear(linear: torch.nn.Linear, weight, bias) -> None:
    linear.weight.data = torch.as_tensor(weight)
    linear.bias.data = torch.as_tensor(bias)


def random_attention(hidden: int, heads: int, seed: int = 0, spread: float = 1.0) -> FlowAttention:
    """Make float64 attention, in evaluation mode, whose keys differ enough to reach the clip."""
    torch.manual_seed(seed)
    attention = FlowAttention(hidden, heads).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(spread * torch.randn_like(parameter))
    return attention


def drive(attention: FlowAttention, blocks: list[torch.Tensor]) -> torch.Tensor:
    """Add the sums of blocks up, round by round, as inference does."""
    projected = [attention.project(x) for x in blocks]
    context: tuple[torch.Tensor, ...] = ()
    for number in range(attention.n_rounds):
        parts = [attention.sums(number, block, context) for block in projected]
        context = context + tuple(sum(part) for part in zip(*parts, strict=True))
    return torch.cat([attention.output(block, context) for block in projected])


def test_release(golden, assert_close):
    arrays = golden("attention")
    attention = FlowAttention(32, 8).eval()
    for name in ("query", "key", "value", "out"):
        weight = arrays[f"w_{name}_projection_weight"]
        set_linear(getattr(attention, name), weight, arrays[f"w_{name}_projection_bias"])
    q, k, v = attention.project(torch.tensor(arrays["x"]))
    assert_close(q, sigmoid(arrays["q"]), atol=1e-6)
    assert_close(k, sigmoid(arrays["k"]), atol=1e-6)
    assert_close(v, arrays["v"], atol=1e-6)

    context = ()
    for number in range(attention.n_rounds):
        context = context + attention.sums(number, (q, k, v), context)
    assert_close(attention.attend(q, context), arrays["heads_out"], atol=1e-6)
    assert_close(attention(torch.tensor(arrays["x"])), arrays["out"], atol=1e-6)


@pytest.mark.parametrize(("n_cells", "heads"), [(1, 1), (2, 2), (23, 1), (23, 4)])
def test_sums_are_the_literal_formula(n_cells, heads, assert_close):
    attention = random_attention(8, heads)
    x = torch.randn(n_cells, 8, dtype=torch.float64)
    q, k, v = (t.detach().numpy() for t in attention.project(x))
    outputs = [literal_flow_attention(q[:, h], k[:, h], v[:, h]) for h in range(heads)]
    expected = attention.out(torch.tensor(np.concatenate(outputs, axis=1)))
    assert_close(attention(x), expected, rtol=1e-11, atol=1e-12)


def test_the_clip_of_the_competition_acts_in_these_tests():
    """Without it the literal formula above would not be tested where it matters."""
    attention = random_attention(8, 4)
    q, k, _ = attention.project(torch.randn(23, 8, dtype=torch.float64))
    context = attention.sums(0, (q, k, k), ())
    queries = attention.sums(1, (q, k, k), context)[1]
    source = (k * queries).sum(2)
    assert 0.2 < (source > 1).double().mean() < 0.8


@pytest.mark.parametrize("n_cells", [1, 5])
def test_gradients(n_cells):
    attention = random_attention(4, 2, seed=1)
    x = torch.randn(n_cells, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,))
    names = [name for name, _ in attention.named_parameters()]

    def of_weights(*weights: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(attention, state, (x.detach(),))

    weights = tuple(p.detach().clone().requires_grad_() for p in attention.parameters())
    assert torch.autograd.gradcheck(of_weights, weights)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_blocks_do_not_matter(sizes, seed):
    attention = random_attention(8, 2, seed)
    x = torch.randn(sum(sizes), 8, dtype=torch.float64)
    torch.testing.assert_close(
        drive(attention, list(x.split(sizes))), attention(x), rtol=1e-10, atol=1e-10
    )


def test_an_empty_block_adds_nothing(assert_close):
    attention = random_attention(8, 2)
    x = torch.randn(7, 8, dtype=torch.float64)
    assert_close(drive(attention, [x[:0], x[:3], x[3:3], x[3:]]), attention(x), rtol=1e-12)


def test_cells_in_another_order(assert_close):
    attention = random_attention(8, 2)
    x = torch.randn(31, 8, dtype=torch.float64)
    order = torch.randperm(31)
    assert_close(attention(x[order]), attention(x)[order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("times", [2, 7])
def test_a_repeated_context_gives_the_same(times, assert_close):
    """Up to the epsilon of 1e-6 beside sums over the context, which does not grow with it."""
    attention = random_attention(8, 2)
    x = torch.randn(13, 8, dtype=torch.float64)
    assert_close(attention(x.repeat(times, 1)), attention(x).repeat(times, 1), atol=1e-5)


def test_every_cell_sees_its_context():
    attention = random_attention(8, 2)
    x = torch.randn(9, 8, dtype=torch.float64)
    changed = x.clone()
    changed[-1] += 1
    assert (attention(changed)[:-1] - attention(x)[:-1]).abs().min() > 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e6])
def test_extreme_inputs_stay_finite(scale):
    """The sigmoid saturates: queries and keys become exact zeros and ones."""
    attention = random_attention(8, 2).float()
    x = (scale * torch.randn(40, 8)).requires_grad_()
    out = attention(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_dropout_of_the_release():
    """The output is dropped at 1 %, whatever the rate of the model; never in evaluation."""
    attention = random_attention(16, 2)
    x = torch.randn(500, 16, dtype=torch.float64)
    assert torch.equal(attention(x), attention(x))
    dropped = (attention.train()(x) == 0).double().mean().item()
    assert dropped == pytest.approx(0.01, abs=0.004)
