"""What is learned: images, equations and text, and the order in which training takes them."""
