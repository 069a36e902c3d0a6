"""The noise schedule, DDIM's step, and the chain of which the last steps carry gradient."""
