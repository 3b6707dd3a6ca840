"""Relative flatness of any layer of any network."""
