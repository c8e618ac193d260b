"""Frozen models beside the one that is trained: their items, and their vectors on the disk."""
