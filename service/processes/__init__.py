"""The processes of a server: the parent that supervises, and its workers."""
