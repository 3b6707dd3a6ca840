"""Each part of a language model's diagnosis is a start, what a batch adds, and what is made of all at the end."""
