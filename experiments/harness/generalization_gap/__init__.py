"""What belongs to `generalization_gap.py` alone."""
