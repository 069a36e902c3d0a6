"""What a Ray job runs to train.

    ray job submit --working-dir . -- python jobs/train.py toy name=first output.storage=/mnt/shared/runs

It is ``rlvid train`` under a path of its own, so that a cluster needs the working directory and no installed command.
"""

import sys

from rlvid.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
