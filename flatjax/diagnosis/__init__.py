"""Diagnose language models: flatness, collapse and geometry of checkpoints, in a record and on one page.

Each part has a start, what a batch adds, and what all batches say at the end. The parts need the extras `experiments`
and `llm`.
"""

import flatjax.diagnosis.extras  # noqa: F401 (first, as what follows needs them)
from flatjax.diagnosis.command import Config as Config
from flatjax.diagnosis.command import main as main
