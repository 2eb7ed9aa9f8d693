"""The bundle: the one thing that passes from training to serving. numpy and pydantic alone, no torch."""
