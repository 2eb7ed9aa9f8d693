"""Other systems' ways in: their shapes of requests, answers and errors, over the same answers as all others."""
