"""Write a CLIP and its dictionary as a bundle, checked against torch."""
