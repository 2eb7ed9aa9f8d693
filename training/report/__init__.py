"""What evaluation found, for people: tables in the terminal, figures, one HTML file."""
