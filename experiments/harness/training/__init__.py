"""How networks are trained, for two experiments or more."""
