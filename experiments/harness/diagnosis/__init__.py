"""Each part of a language model's diagnosis has a start, what a batch adds, and what all batches say at the end."""
