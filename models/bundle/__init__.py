"""The bundle: the only artifact passed from training to serving. Needs numpy and pydantic, not torch."""
