"""Ranks, collectives with a gradient, and random state."""
