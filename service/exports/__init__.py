"""Answers in other forms: tables in the terminal, one HTML page, a graph for other viewers."""
