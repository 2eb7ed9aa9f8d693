"""The routes, a file a kind of question."""
