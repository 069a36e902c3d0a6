"""Inputs and outputs: prompts, videos, clips that are encoded once, and the archive of samples."""
