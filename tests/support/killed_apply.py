"""`prunelight` in a process that is killed just before the file of its nth kept layer is whole.

python tests/support/killed_apply.py N ARGUMENTS
"""

import os
import signal
import sys

from prunelight.cli import main

left = int(sys.argv[1])


def kill(event, arguments):
    """Kill this process, as the system does, at a rename to the name of a layer."""
    global left
    if event == "os.rename" and os.path.basename(arguments[1]).startswith("layer-"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(kill)
    main(sys.argv[2:])
