"""Published checkpoints of language models, read from a local folder or a hub."""

from flatjax.loading.checkpoint import load_decoder as load_decoder
from flatjax.loading.checkpoint import load_tokenizer as load_tokenizer
