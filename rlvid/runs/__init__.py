"""The read side of a run's folder."""
