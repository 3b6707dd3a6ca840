"""Flax models whose features and head the metrics can be taken of."""

from flatjax.models.transformer import Transformer as Transformer
