"""`prunelight` in a process that is killed just before its nth scores so far are in place.

python tests/support/killed_score.py N ARGUMENTS
"""

import os
import signal
import sys

from prunelight.cli import main

left = int(sys.argv[1])


def kill(event, arguments):
    """Kill this process, as the system does, at a rename to the number of the scores so far."""
    global left
    if event == "os.rename" and os.path.basename(arguments[1]).isdecimal():
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(kill)
    main(sys.argv[2:])
