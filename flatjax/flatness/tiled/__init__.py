"""A head too large for its logits, read in tiles of rows."""
