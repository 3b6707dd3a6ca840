"""Diagnose a language model's checkpoints: flatness, collapse, and the geometry of their residual streams.

    python experiments/diagnose_llm.py runs/train_lm/standard-library            # all checkpoints of a run side by side
    python experiments/diagnose_llm.py ~/models/pythia-160m --text book.txt      # a folder as it is published
    python experiments/diagnose_llm.py EleutherAI/pythia-160m@step1000 EleutherAI/pythia-160m --text book.txt

It reads sequences of tokens from the text and reports, each number with its standard error: loss and perplexity;
relative flatness κ and κ̂ of the head (larger is sharper), exactly; κ of the layers, by probes on a part of the text;
neural collapse over the vocabulary; the geometry of the residual stream by layer, how straight it is and how it grows;
how the Jacobians of the blocks align; logit sharpness; and what all of this cost in forward passes.

Writes to `runs/diagnose_llm/<name>/`: `config.json`, `metrics.jsonl` (a line a part), `diagnosis.json` (every number,
with its standard error, the number of its tokens and its convention) and `diagnosis.html`, one page that needs nothing
else. Killed at any moment, the same command with --resume goes on to the same numbers, and at most a minute of work is
lost; with more checkpoints or steps it adds these. A checkpoint is known by its weights: one that was trained on is
measured anew, one that was moved is not. --redraw makes the page anew from `diagnosis.json`.

Memory beside the parameters, in numbers (depth L, width m, vocabulary d, batches of b sequences of t tokens, G blocks
of text): the stream of a batch, (L + 2)·b·t·m, and as much again for what is computed from it; for the blocks of text
the moments of the C kept classes, 2·G·C·m, and a triangle for each layer, G·(L + 2)·m²; for NC4 moments of the whole
vocabulary, about 6·d·m; and for the profile the logits of `profile_batch` sequences, with what a second derivative
keeps of a forward pass on them. None of these grows with the text: only a few numbers for each sequence do.
"""

import os

# Its threads spin as they wait: where others compute beside, decompositions take a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import tyro

from flatjax.diagnosis.command import Config, main

if __name__ == "__main__":
    main(tyro.cli(Config))
