"""Recipes: one TOML file specifies CLIP, images, CLT and training; also estimates of what a recipe costs."""
