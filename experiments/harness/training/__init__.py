"""Two experiments or more train their networks with these."""
