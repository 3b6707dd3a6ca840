"""Only `regularise.py` uses this folder."""
