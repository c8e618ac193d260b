"""Everything that knows DeepSpeed: its configuration, its engine, its optimizer groups."""
