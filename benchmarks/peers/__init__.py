"""Those who are compared: each trains the same task in its own way."""
