"""The built-in world: a procedural text-to-video setting small enough for a laptop, and learned."""
