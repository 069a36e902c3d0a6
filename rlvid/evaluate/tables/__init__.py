"""Tables and pages of an evaluation's numbers."""
