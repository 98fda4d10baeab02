"""`prunelight` in a process that is killed just before its nth rename to a name of a kind.

python tests/support/killed_at_rename.py N PATTERN ARGUMENTS
"""

import os
import re
import signal
import subprocess
import sys

from source_tree import ROOT


def kill_at_rename(number, pattern, arguments):
    """Run the command in a process of its own, killed before so many files or directories.

    Args:
        number: of the rename at which the process is killed, from 1 on.
        pattern: of the whole new name, without its directory.
        arguments: of the command.
    """
    support = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, __file__, str(number), pattern, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), support])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def main():
    from prunelight.cli import main as command

    left, pattern = int(sys.argv[1]), re.compile(sys.argv[2])

    def kill(event, arguments):
        """Kill this process, as the system does, at a rename to such a name."""
        nonlocal left
        if event == "os.rename" and pattern.fullmatch(os.path.basename(arguments[1])):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    command(sys.argv[3:])


if __name__ == "__main__":
    main()
