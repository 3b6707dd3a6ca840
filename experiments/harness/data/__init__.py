"""Networks learn from images, equations and text, in an order that is decided here."""
