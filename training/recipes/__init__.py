"""Recipes: one TOML file says which CLIP, which images, which CLT and how it is trained; and what that would cost."""
