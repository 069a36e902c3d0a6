"""Legend of the dimension letters and the value ranges used in every name and docstring.

A tensor's name ends with its dimensions: ``latents_BCFhw``, ``frames_BSCHW``, ``weights_BS``.

========  ====================================================================
letter    meaning
========  ====================================================================
B         videos in a batch
F         frames of a video
S         frames that are scored, one for each segment
C         channels: 3 for pixels, 4 for latents
H, W      height and width in pixels
h, w      height and width of the latents
L, D      tokens of a prompt, width of its embedding
K         steps of the chain that carry gradient
N         anything flattened, or a count without a letter of its own
========  ====================================================================

Pixels are floats in [0, 1] everywhere but inside an autoencoder, which works in [-1, 1]. Latents are scaled
to about unit variance. Timesteps are integers in [0, 1000), and floats in [0, 1000] on a
flow; tau and shares are fractions in [0, 1].
"""

ROUNDING = 2.0**-19
"""Relative difference up to which scores computed in float32 are equal: 16 units in the last place, for a network adds
up many numbers."""
