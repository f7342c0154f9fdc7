"""New code for running programs: it is loaded in a process of its own first.

What cannot be loaded shows a short traceback and changes nothing: the programs go on with the code
that they have, and the next file that is saved is the next try.
"""

from devstack.console import Console
from devstack.processes import Process, stop
from devstack.supervisor import Supervisor
from devstack.watch import Watch

SHOWN = 3


class Reloader:
    """Call `tick` often; nothing else happens by itself."""

    def __init__(
        self, watch: Watch, check: Process, supervisor: Supervisor, names: tuple[str, ...]
    ) -> None:
        """`check` ends with 0 if the code can be loaded; `names` are the programs that hold it."""
        self.watch, self.check, self.supervisor, self.names = watch, check, supervisor, names
        self.console: Console = supervisor.console
        self.changed: set[str] = set()
        self.pending = False  # there is code that is newer than what runs

    def tick(self) -> None:
        """Look for changes, and go on with those that were found."""
        if changed := self.watch.changes():
            self.changed |= changed
            self.pending = self.pending or any(path.endswith(".py") for path in changed)
            if self.pending:
                self.stop()
                self.check.log.unlink(missing_ok=True)
                self.check.start()
            else:
                # templates are read by the web alone, which caches them
                self._reload(("web",))
        elif self.check.popen and not self.check.running:
            failed, self.check.popen = self.check.exit_code, None
            if failed:
                self.console.say(
                    f"{self._shown()} changed and cannot be loaded: the code from before goes on"
                    f" running until you save again.\n{self.check.last_lines()}"
                )
            else:
                self.pending = False
                self._reload(self.names)

    def stop(self) -> None:
        """End the check that runs."""
        self.check.grace = 0
        stop([self.check])

    def _reload(self, names: tuple[str, ...]) -> None:
        self.console.say(f"{self._shown()} changed: {', '.join(names)} start again")
        self.changed = set()
        self.supervisor.reload(names)

    def _shown(self) -> str:
        return ", ".join(sorted(self.changed)[:SHOWN])
