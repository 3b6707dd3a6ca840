"""What belongs to `regularise.py` alone."""
