"""What goes in and what comes out: prompts, videos, clips that are encoded once, and the archive of samples."""
