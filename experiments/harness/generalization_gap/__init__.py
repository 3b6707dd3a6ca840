"""Only `generalization_gap.py` uses this folder."""
