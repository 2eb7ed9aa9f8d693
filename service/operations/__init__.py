"""What an operator sets and sees: settings, keys, logs, metrics."""
