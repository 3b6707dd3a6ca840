"""The parts of a diagnosis of a language model: each a start, what a batch adds, and what is made of all in the end."""
