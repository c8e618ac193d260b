"""Embeddings of whole tables, on the disk."""
