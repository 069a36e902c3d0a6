"""What a Ray job runs to evaluate: ``ray job submit --working-dir . -- python jobs/evaluate.py RUN``.

It is ``rlvid evaluate`` under a path of its own, so that a cluster needs no installed command.
"""

import sys

from rlvid.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
