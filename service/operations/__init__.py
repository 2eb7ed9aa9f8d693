"""Configuration and monitoring: settings, keys, logs, metrics."""
