"""An answer to take along: tables in the terminal, one HTML page, the graph that other viewers read."""
