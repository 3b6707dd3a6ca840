"""Only `llm_placement.py` uses this folder."""
