"""A CLIP and its dictionary written as a bundle, checked against torch."""
