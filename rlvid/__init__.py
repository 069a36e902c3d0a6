"""rlvid: reward fine-tuning of text-to-video diffusion models, on Ray.

Importing the package is cheap: it loads neither torch nor Ray. It sets one environment variable, ``GOMP_SPINCOUNT``,
for itself and the processes that it starts, unless that or ``OMP_WAIT_POLICY`` is set.
"""

import os

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # Threads of torch's OpenMP that wait for one another keep their cores busy for milliseconds by default. On a CPU
    # that another process uses too, every operation of two threads waits like that, and all of it takes twenty times as
    # long. A thousand rounds, some microseconds, cost nothing on an idle CPU. OpenMP reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
