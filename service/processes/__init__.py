"""The processes of a server: the supervising parent and its workers."""
