"""Runs a command that gets a signal when the program that started it dies.

Usage: python -IS child.py SIGNAL PARENT_PID COMMAND [ARGUMENT ...]

A runner that is killed can stop nothing, so on Linux the kernel does it. Elsewhere the next start
sweeps what was left. It is a program of its own because unshare and setpriv, which may stand before
it, clear the setting, and because code between fork and exec is unsafe where threads run.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    signal_number, parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal_number))
        # It may have died before the call, and nobody would ever send the signal.
        if os.getppid() != int(parent):
            sys.exit("the program that started this one is gone")
    os.execvp(command[0], command)  # noqa: S606
