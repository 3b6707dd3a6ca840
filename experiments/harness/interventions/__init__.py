"""Only `interventions.py` uses this folder: arms, their training, and what came of them."""
