"""Retrieval metrics over a sharded validation set, and reports of them."""
