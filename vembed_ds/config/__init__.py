"""The configuration of a run: schema, loading and cross-field validation."""
