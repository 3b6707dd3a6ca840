"""What belongs to `neural_collapse.py` alone."""
