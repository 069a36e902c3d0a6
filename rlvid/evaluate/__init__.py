"""Evaluation: videos from fixed noise, metrics of each, tables with intervals, pictures; Ray if it is asked for."""
