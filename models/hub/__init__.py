"""Bundles to and from the Hugging Face hub: a repository's folder, an address, and a download that is verified."""
