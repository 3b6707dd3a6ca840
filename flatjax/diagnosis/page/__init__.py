"""A diagnosis has a page: its words, its figures, and the HTML around them."""
