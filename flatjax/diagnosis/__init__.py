"""Diagnose language models: flatness, collapse and geometry of checkpoints, in a record and on one page.

Each part has a start, what a batch adds, and what all batches say at the end. The parts need the extras `experiments`
and `llm`.
"""

from flatjax.loading.optional import optional

for _name in ("tokenizers", "matplotlib", "tqdm", "tyro"):
    optional(_name, use="work on language models needs", extras="experiments,llm")
