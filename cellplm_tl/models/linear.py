"""Linear layers on the fastest product of matrices that PyTorch has here.

On a CPU, `torch.nn.functional.linear` in float32 calls MKL, whose kernels stop at AVX2 on
processors that are not Intel's. oneDNN, which PyTorch brings along for its lower precisions, uses
AVX-512 wherever it exists: twice the speed there, in the same float32
(docs/benchmarks/embed_speed.md). Only this file knows of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Without a public name: it may be missing from other builds of PyTorch, and from later ones.
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) times weight (out, in), transposed. A strided `x` would be very slow."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """x W^T + b and its gradients; the operation itself brings none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.T) if for_x else None,
            _product(gradient.T, x.T) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, computed in the number format of the weights and returned in that of `x`.

    Parameters
    ----------
    x : Tensor, shape (cells, in)
    weight : Tensor, shape (out, in)
    bias : Tensor, shape (out,), optional

    Returns
    -------
    Tensor, shape (cells, out)
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    x = x.to(weight.dtype)
    float32_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    if HAS_ONEDNN and float32_on_cpu and x.dim() == 2 and not torch.compiler.is_compiling():
        return _OneDNNLinear.apply(x.contiguous(), weight.contiguous(), bias).to(dtype)
    return F.linear(x, weight, bias).to(dtype)


class Linear(nn.Linear):
    """`torch.nn.Linear` by :func:`linear`: bfloat16 weights mean bfloat16 products, no more."""

    def forward(self, x: Tensor) -> Tensor:
        """(cells, in) → (cells, out)."""
        return linear(x, self.weight, self.bias)
