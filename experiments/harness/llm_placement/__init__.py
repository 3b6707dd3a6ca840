"""What belongs to `llm_placement.py` alone."""
