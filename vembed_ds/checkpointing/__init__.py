"""Saving, resuming, consolidating and exporting."""
