"""Layers of the encoder: a map per cell, and for flow attention three sums over the context.

Every layer is used in the same three steps, by training (one block: the whole context) and by
inference (many blocks) alike: `begin` maps a block, `sums` says what the block adds to each of
`n_rounds` sums over the context, `finish` maps the block again, given the sums.

Axes: `cells` (of a block), `hidden`.
"""

from __future__ import annotations

from torch import Tensor, nn

from cellplm_tl.models.attention import FlowAttention, Sums
from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.embedder import NORM_EPSILON, make_norm
from cellplm_tl.models.linear import Linear

FlowBlock = tuple[Tensor, Tensor, Tensor, Tensor]  # u (cells, hidden) and its q, k, v


class FlowLayer(nn.Module):
    """u = u + FlowAttention(LN1(u)); u = u + FF(LN2(u)) (pre-norm, as the release)."""

    n_rounds = FlowAttention.n_rounds

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        hidden = config.hidden
        self.norm1 = nn.LayerNorm(hidden, NORM_EPSILON)
        self.attention = FlowAttention(hidden, config.heads)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(hidden, NORM_EPSILON)
        self.widen = Linear(hidden, 2 * hidden)
        self.activation = nn.GELU()
        self.widen_dropout = nn.Dropout(config.dropout)
        self.narrow = Linear(2 * hidden, hidden)
        self.narrow_dropout = nn.Dropout(config.dropout)

    def begin(self, u: Tensor) -> FlowBlock:
        """Project a block, (cells, hidden)."""
        return (u, *self.attention.project(self.norm1(u)))

    def sums(self, number: int, block: FlowBlock, context: Sums) -> Sums:
        """Return what the block adds to round `number`."""
        return self.attention.sums(number, block[1:], context)

    def finish(self, block: FlowBlock, context: Sums) -> Tensor:
        """Return the block after the layer, (cells, hidden)."""
        u = block[0] + self.attention_dropout(self.attention.output(block[1:], context))
        wide = self.widen_dropout(self.activation(self.widen(self.norm2(u))))  # (cells, 2 hidden)
        return u + self.narrow_dropout(self.narrow(wide))


class MLPLayer(nn.Module):
    """u = u + norm(Dropout(PReLU(Linear(u)))): Table 10, "w/o Transformer Encoder"."""

    n_rounds = 0

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.linear = Linear(config.hidden, config.hidden)
        self.activation = nn.PReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = make_norm(config, config.hidden)

    def begin(self, u: Tensor) -> Tensor:
        """Return the block, (cells, hidden)."""
        return u

    def finish(self, u: Tensor, context: Sums) -> Tensor:
        """Return the block after the layer, (cells, hidden)."""
        return u + self.norm(self.dropout(self.activation(self.linear(u))))


def make_encoder(config: CellPLMConfig) -> nn.ModuleList:
    """Return the config's layers."""
    layers = {"flow": FlowLayer, "mlp": MLPLayer}
    if config.encoder == "none":
        return nn.ModuleList()
    return nn.ModuleList(layers[config.encoder](config) for _ in range(config.encoder_layers))
