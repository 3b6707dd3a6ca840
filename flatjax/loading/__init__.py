"""Published checkpoints of language models, read from a local folder or a hub."""

from flatjax.loading.checkpoint import Checkpoint as Checkpoint
from flatjax.loading.checkpoint import load_decoder as load_decoder
from flatjax.loading.checkpoint import load_tokenizer as load_tokenizer
from flatjax.loading.checkpoint import open_checkpoint as open_checkpoint
