"""Rebuilds the weights of the built-in world from a seed: autoencoder, text-to-video model, then the rewards."""
