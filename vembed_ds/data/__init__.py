"""Records, readers, per-item encoding and the order of the samples."""
