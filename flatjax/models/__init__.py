"""Flax models whose features and head the metrics can be taken of."""

from flatjax.models.decoder.config import DecoderConfig as DecoderConfig
from flatjax.models.decoder.config import RotaryScaling as RotaryScaling
from flatjax.models.decoder.model import Decoder as Decoder
from flatjax.models.decoder.sharding import decoder_shardings as decoder_shardings
from flatjax.models.mlp import MLP as MLP
from flatjax.models.resnet import ResNet18 as ResNet18
from flatjax.models.transformer import Transformer as Transformer
from flatjax.models.vit import ViT as ViT
