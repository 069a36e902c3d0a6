"""The results of an evaluation: summaries, and readers that check files from other people."""
