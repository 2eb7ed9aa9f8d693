"""Evaluation results for readers: tables in the terminal, figures, one HTML file."""
