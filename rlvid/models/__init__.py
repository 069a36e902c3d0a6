"""Text-to-video models behind one interface."""
