"""Pretraining and fine-tuning."""

from __future__ import annotations

from cellplm_tl.train.contexts import Corruption
from cellplm_tl.train.fit import TrainConfig
from cellplm_tl.train.pretrain import PretrainConfig, pretrain

__all__ = ["Corruption", "PretrainConfig", "TrainConfig", "pretrain"]
