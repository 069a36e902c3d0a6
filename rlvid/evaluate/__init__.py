"""Evaluation: videos from fixed noise, their metrics, tables with intervals, pictures; with or without Ray."""
