"""Command line: `devstack up [--services-only]` and `devstack run -- COMMAND`."""

import argparse
import sys
from pathlib import Path

from devstack import commands, project
from devstack.state import StackError


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="devstack", description=__doc__)
    wanted = parser.add_subparsers(dest="wanted", required=True)
    up = wanted.add_parser("up", help="run the whole stack until Ctrl-C")
    up.add_argument(
        "--services-only",
        action="store_true",
        help="only database and broker, for programs that you start in a debugger",
    )
    run = wanted.add_parser("run", help="run a command with database and broker")
    run.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    try:
        here = project.find(Path.cwd())
        if arguments.wanted == "up":
            return commands.up(here, services_only=arguments.services_only)
        return commands.run(here, arguments.command)
    except StackError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
