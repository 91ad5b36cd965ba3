"""Training and test images, in which order, and how they are augmented."""
