"""What a run needs of its machines, looked at before it begins."""
