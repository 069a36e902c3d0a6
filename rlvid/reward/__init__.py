"""Rewards: image rewards on frames, and how a video's frames make one number (SegVR and TAR)."""
