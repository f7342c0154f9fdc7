"""PostgreSQL and Valkey of the baked project's devstack, until standard input ends.

`python services.py FOLDER` prints their URLs, then obeys: kill, start, freeze, thaw the broker.
"""

import json
import signal
import sys
from pathlib import Path

from devstack import services
from devstack.processes import wait_until_ready


def obey(command, broker):
    if command == "start":
        broker.start()
        wait_until_ready([broker])
    elif command == "kill":
        broker.send(signal.SIGKILL)
        broker.popen.wait()
    else:
        broker.send({"freeze": signal.SIGSTOP, "thaw": signal.SIGCONT}[command])


def main():
    with services.running(Path(sys.argv[1]), {}, durable=True) as running:
        broker = next(process for process in running.processes if process.name == "valkey")
        print(json.dumps(running.environment), flush=True)
        try:
            for line in sys.stdin:
                obey(line.strip(), broker)
                print(json.dumps("done"), flush=True)
        finally:
            broker.send(signal.SIGCONT)  # it could not stop while it is frozen


if __name__ == "__main__":
    main()
