"""Only `neural_collapse.py` uses this folder."""
