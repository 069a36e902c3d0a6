"""Models and losses of rewards that are fitted to preference pairs. Pure torch."""
