"""One step on a noise path, and the chain of which the last steps carry gradient."""
