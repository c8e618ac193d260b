"""One training step: embed, loss, replay, reduce once, update."""
