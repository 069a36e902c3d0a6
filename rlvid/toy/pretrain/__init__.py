"""Rebuilds the weights of the built-in world from a seed: autoencoder, rewards, then the text-to-video model."""
