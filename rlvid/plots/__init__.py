"""Every picture that rlvid draws."""
