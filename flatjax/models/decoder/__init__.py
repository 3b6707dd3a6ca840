"""A decoder-only language model, spread over devices as it is built."""

from flatjax.models.decoder.config import DecoderConfig as DecoderConfig
from flatjax.models.decoder.config import RotaryScaling as RotaryScaling
from flatjax.models.decoder.model import Decoder as Decoder
from flatjax.models.decoder.sharding import decoder_shardings as decoder_shardings
