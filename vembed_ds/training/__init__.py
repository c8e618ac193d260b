"""Composition: from a validated configuration to a trained model."""
