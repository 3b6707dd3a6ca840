"""The page of a diagnosis: its words, its figures, and the HTML around them."""
