"""Flow attention, written as sums over a context.

For one head, with queries q_i and keys k_i after the sigmoid, values v_i and n cells, three rounds
of sums make everything that a cell needs to know of its context (docs/design.md, "A context is a
sum"):

1. K = sum_j k_j, Q = sum_i q_i;
2. K' = sum_j O_j k_j, Q' = sum_i I_i q_i with I_i = 1 / ((q_i + e) . (K + e)) and
   O_j = 1 / ((k_j + e) . (Q + e));
3. Z = sum_j c_j, M = sum_j k_j (c_j v_j)^T with c_j = exp(clip((k_j + e) . (Q' + e), -1, 1)).

The output of cell i is a_i I_i (n / Z) q_i^T M with a_i = sigmoid((q_i + e) . (K' + e)). A whole
context in memory is the case of one block; inference adds the sums up over blocks, in the same
code.

Axes: `cells` (of a block), `heads`, `head_dim`, `hidden` = heads x head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellplm_tl.models.linear import Linear, linear

EPSILON = 1e-6  # e above, added to every entry (the release)
COMPETITION_CLIP = 1.0  # bound of the competition's logit (the release)
OUTPUT_DROPOUT = 0.01  # after the output projection, whatever the model's rate (the release)

Sums = tuple[Tensor, ...]  # of the context so far, in the order of the rounds
Projected = tuple[Tensor, Tensor, Tensor]  # q, k, v of a block, each (cells, heads, head_dim)


def _dot(cells: Tensor, total: Tensor) -> Tensor:
    """(cells, heads, head_dim) . (heads, head_dim) → (cells, heads), with the release's epsilon."""
    shifted = total + EPSILON
    return (cells * shifted).sum(2) + EPSILON * shifted.sum(1)


class FlowAttention(nn.Module):
    """Flow attention (Wu et al., 2022) as the release has it: linear in the number of cells."""

    n_rounds = 3

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = Linear(hidden, hidden)
        self.key = Linear(hidden, hidden)
        self.value = Linear(hidden, hidden)
        self.out = Linear(hidden, hidden)
        self.dropout = nn.Dropout(OUTPUT_DROPOUT)

    def project(self, x: Tensor) -> Projected:
        """(cells, hidden) → q, k (after the sigmoid) and v, each (cells, heads, head_dim)."""
        shape = (x.shape[0], self.heads, x.shape[1] // self.heads)
        q = self.query(x).sigmoid_().view(shape)
        k = self.key(x).sigmoid_().view(shape)
        return q, k, self.value(x).view(shape)

    def sums(self, number: int, block: Projected, context: Sums) -> Sums:
        """Return what a block adds to round `number` (0, 1, 2), given the sums of earlier rounds.

        Round 0: n (), K, Q (heads, head_dim). Round 1: K', Q'. Round 2: Z (heads,), M (heads,
        head_dim, head_dim).
        """
        q, k, v = block
        if number == 0:
            return q.new_tensor(float(q.shape[0])), k.sum(0), q.sum(0)
        _, keys, queries = context[:3]
        if number == 1:
            outgoing = _dot(k, queries).reciprocal()  # (cells, heads)
            incoming = _dot(q, keys).reciprocal()
            return torch.einsum("ch,chd->hd", outgoing, k), torch.einsum("ch,chd->hd", incoming, q)
        logits = _dot(k, context[4]).clamp(-COMPETITION_CLIP, COMPETITION_CLIP)
        competition = logits.exp()  # (cells, heads)
        weighted = v * competition[:, :, None]
        return competition.sum(0), torch.einsum("chd,che->hde", k, weighted)

    def attend(self, q: Tensor, context: Sums) -> Tensor:
        """Return the heads' outputs (cells, hidden) before the output projection."""
        n_cells, keys, _, kept_keys, _, total, memory = context
        incoming = _dot(q, keys).reciprocal()
        allocation = _dot(q, kept_keys).sigmoid()  # (cells, heads)
        share = allocation * incoming * (n_cells / total)
        shared = q * share[:, :, None]
        # Head by head: PyTorch's batched product is half as fast on a CPU (see linear.py).
        return torch.cat([linear(shared[:, h], memory[h].T) for h in range(self.heads)], 1)

    def output(self, block: Projected, context: Sums) -> Tensor:
        """Return what attention adds to the block's cells, (cells, hidden)."""
        return self.dropout(self.out(self.attend(block[0], context)))

    def forward(self, x: Tensor) -> Tensor:
        """(cells, hidden) of a whole context → (cells, hidden)."""
        block = self.project(x)
        context: Sums = ()
        for number in range(self.n_rounds):
            context = context + self.sums(number, block, context)
        return self.output(block, context)
