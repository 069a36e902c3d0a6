"""Fits a reward to preference pairs, on Ray."""
