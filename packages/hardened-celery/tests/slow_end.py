"""A worker that takes its time when Python is already on its way out; `tests.app` imports it."""

import os
import time


class Slow:
    """Removed with its module, when the handlers of signals are gone; ends when its file is."""

    def __init__(self, file: str) -> None:
        self.file, self.pid = file, os.getpid()

    def __del__(
        self, getpid=os.getpid, make=os.mkdir, stat=os.access, sleep=time.sleep, there=os.F_OK
    ) -> None:
        if getpid() == self.pid:
            make(self.file)
            while stat(self.file, there):
                sleep(0.02)


slow = Slow(os.environ["SLOW_END"])
