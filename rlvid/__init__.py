"""rlvid: reward fine-tuning of text-to-video diffusion models, on Ray.

Importing the package is cheap: it loads neither torch nor Ray.
"""

__version__ = "0.1.0"
