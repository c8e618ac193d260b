"""Hard negatives: documents that a model takes for answers, and that are none."""
