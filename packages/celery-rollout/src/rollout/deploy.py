"""From what runs to one release: the steps of a deploy, each of which may be given again."""

import json

from rollout.platform import Platform
from rollout.shell import StepError, say


class Deploy:
    """What brings one release in the place of whatever runs."""

    def __init__(self, platform: Platform, release: str, patience: float) -> None:
        """`patience`: seconds to wait for a sign of life."""
        self.platform = platform
        self.release = release
        self.patience = patience

    def ask(self, release: str, *question: str, stdin: str = "", alone: bool = False) -> str:
        """Have a release answer one of the questions of `rollout.release`."""
        command = ("-m", "rollout.release", *question)
        return self.platform.inside(release, *command, stdin=stdin, alone=alone).strip()

    def check(self, running: str | None, gone: list[str]) -> None:
        """Raise StepError if the release could not run, or would break the one that runs.

        `gone`: tasks and queues of that one to which nobody sends any more.
        """
        # `current` is what a request to a socket without a web tries to start.
        running_now = self.platform.all_running() - {"current"}
        beside = {running or self.release, *running_now} - {self.release}
        sent = [self.tasks(other) for other in sorted(beside)]
        for tasks in sent or ["{}"]:
            say(self.ask(self.release, "check", *gone, stdin=tasks))
        self.tasks(self.release)
        say("checked: settings, database, broker, tasks, migrations")

    def tasks(self, release: str) -> str:
        """Return its answer to `tasks`, noted when it is deployed: later it may be unable to."""
        file = self.platform.releases / release / ".tasks"
        try:
            json.loads(file.read_text())
        except (FileNotFoundError, ValueError):  # ValueError: half of it, after a loss of power
            self.platform.note(release, file.name, self.ask(release, "tasks").rpartition("\n")[2])
        return file.read_text()

    def migrate(self) -> None:
        """Apply the migrations, which add only; raise StepError if a lock cannot be had in time."""
        self.ask(self.release, "migrate", alone=True)
        say("migrated")

    def replace(self, *, back: bool = False) -> None:
        """Have this release run, and no other; raise StepError when it gives no sign of life."""
        platform, release = self.platform, self.release
        try:
            platform.prepare(release)
            # For jobs whose time was kept by what now ends, and those that come due without beat.
            platform.start(release, "reconcile")
            # Back the other way round: what the newer web and beat have sent only its workers know.
            steps = (self.replace_workers, self.replace_web, self.replace_beat)
            for step in (steps[1], steps[2], steps[0]) if back else steps:
                step()
            say(self.ask(release, "queues", release, str(self.patience)))
            # That of this release goes on until no process that has ended could have kept a time.
            self.end_others("reconcile")
            platform.forget_others(release)
        except StepError as error:
            if not back:
                platform.stop({"reconcile": platform.running("reconcile")})
            raise StepError(f"{error}\n{platform.last_words(release)}".rstrip()) from None

    def replace_workers(self) -> None:
        """New workers first: at no time is a queue without one."""
        self.start(*workers(self.platform.roles(self.release)))
        self.ask(self.release, "workers", self.release, str(self.patience))
        say("its workers serve every queue")
        self.end_others(*workers(self.platform.roles()))

    def replace_web(self) -> None:
        """Both share one address for a moment."""
        self.start("web")
        self.platform.wait_for_web(self.release, self.patience)
        say("its web answers")
        self.end_others("web")

    def replace_beat(self) -> None:
        """The old one first: two would send everything twice."""
        self.end_others("beat", "flower")
        wanted = self.platform.wanted(self.release)
        self.start(*[role for role in ("beat", "flower") if role in wanted])

    def start(self, *roles: str) -> None:
        """Start these roles of the release; say which did not run already."""
        missing = [role for role in roles if self.release not in self.platform.running(role)]
        if missing:
            self.platform.note_settings(self.release)
        self.platform.start(self.release, *roles)
        if missing:
            say(f"started {', '.join(missing)}")

    def end_others(self, *roles: str) -> None:
        """End what other releases run in these roles, all at once, each within its own grace."""
        found = {role: set(self.platform.running(role)) - {self.release} for role in roles}
        others = {role: sorted(releases) for role, releases in found.items() if releases}
        if others:
            self.platform.stop(others)
            releases = sorted({name for names in others.values() for name in names})
            say(f"ended {', '.join(others)} of {', '.join(releases)}")


def workers(roles: list[str]) -> list[str]:
    """Return the roles that are not web, beat or Flower: workers, and what you have added."""
    return [role for role in roles if role not in ("web", "beat", "flower", "reconcile")]
