"""What belongs to `interventions.py` alone: arms, their training, and what came of them."""
