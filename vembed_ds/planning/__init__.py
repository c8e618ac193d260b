"""What a run takes, before it runs: memory and traffic of a rank; see docs/scaling.md."""
