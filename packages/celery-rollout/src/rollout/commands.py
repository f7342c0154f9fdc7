"""Deploy, rollback and status: each is finished by the same command, whenever it was killed."""

import argparse

from rollout.deploy import Deploy
from rollout.platform import Platform
from rollout.shell import RefusedError, StepError, say
from rollout.source import wanted

KEPT = 5


def deploy(platform: Platform, options: argparse.Namespace) -> int:
    """Build, check, migrate, replace what runs, and go back when that fails; return the exit code.

    Up to `replace` all that fails is a refusal: what runs has not been touched.
    """
    running = platform.current()
    # First, as it says which name a release has to have so that new settings reach it.
    release, source, commit = wanted(platform, options)
    platform.check_settings()
    to_it = Deploy(platform, release, options.patience)
    before = platform.begun()
    platform.begin("deploy of", release)
    try:
        if release not in platform.built():
            platform.build(source, release, commit)
            say(f"built release {release}")
        if not options.dry_run:
            platform.provide(release)
        to_it.check(running, options.gone)
        if options.dry_run:
            platform.begin(*before)
            say(f"would migrate, and replace {running or 'nothing'}")
            return 0
        to_it.migrate()
    except (StepError, OSError) as error:
        platform.begin(*before)
        raise RefusedError(str(error)) from None
    try:
        to_it.replace()
    except StepError as error:
        say(f"failed: {error}")
        if running is None:
            end_first(platform)
            return 4
        if running == release:
            say(f"{running} ran before, too: there is none to go back to")
            return 4
        say(f"going back to {running}")
        return go_back(Deploy(platform, running, options.patience), 3)
    platform.is_current(release)
    platform.begin("", "")
    say(f"done: {release} runs")
    try:
        platform.tidy(KEPT)
    except (StepError, OSError) as error:
        say(f"old releases could not be deleted: {error}")
    return 0


def rollback(platform: Platform, options: argparse.Namespace) -> int:
    """Undo a deploy or finish a rollback that stopped half-way, else go to the release before.

    Return the exit code.
    """
    current = platform.current()
    what, named = platform.begun()
    if current is None and what and not options.dry_run:
        end_first(platform)
        return 0
    if current is None:
        raise RefusedError("no deploy has succeeded yet: there is nothing to go back to")
    target = options.to or platform.previous()
    if options.to is None and (what == "rollback to" or named not in ("", current)):
        target = named if what == "rollback to" else current
        say(f"the {what} {named} stopped half-way: going to {target}")
    there = ", ".join(platform.built())
    if target is None:
        before = f"no release is known to have run before {current}"
        raise RefusedError(f"{before}; `rollback --to` goes to any that is there: {there}")
    if target not in platform.built():
        raise RefusedError(f"there is no release {target}; there are: {there}")
    to_it = Deploy(platform, target, options.patience)
    try:
        to_it.ask(target, "check", stdin="null")  # where this fails nothing could be started
    except StepError as error:
        raise RefusedError(f"{target} could not run now, so nothing was changed: {error}") from None
    if options.dry_run:
        say(f"would go back to {target}")
        return 0
    platform.begin("rollback to", target)  # given again, this goes on to there
    platform.is_current(target, back=True)
    return go_back(to_it, 0)


def go_back(to_it: Deploy, code: int) -> int:
    """Have an earlier release run again; return `code`, or 4 if it does not."""
    platform = to_it.platform
    try:
        to_it.replace(back=True)
    except StepError as error:
        say(f"{to_it.release} does not work either: {error}")
        return 4
    platform.begin("", "")
    say(f"{to_it.release} runs again; the database keeps what was added to it")
    if platform.runs_with_other_settings(to_it.release):
        say(f"{platform.env} has changed since some of it started: what starts again reads it")
    return code


def end_first(platform: Platform) -> None:
    """End what a first release has started: there is none to go back to."""
    platform.close()
    platform.stop({role: platform.running(role) for role in platform.roles()})
    platform.begin("", "")
    say("it was the first release; what it had started has ended")


def status(platform: Platform) -> int:
    """Say what there is and what runs; return the exit code."""
    for name in platform.built():
        words = [word for word in ("current", "previous") if getattr(platform, word)() == name]
        words += [] if platform.has_run(name) else ["never succeeded"]
        roles = [role for role in platform.roles() if name in platform.running(role)]
        print(f"{name}  {' '.join(words)}  {'runs ' + ', '.join(roles) if roles else ''}".rstrip())
        for role in platform.ailing(name):
            print(f"    {role} has crashed and is started again, and again")
        if name == platform.current():
            for role in sorted(set(platform.wanted(name)) - set(roles)):
                print(f"    {role} does not run")
            if platform.runs_with_other_settings(name):
                print(f"    {platform.env} has changed since some of it started")
    what, release = platform.begun()
    if what:
        then = "or roll back" if what == "deploy of" else "or deploy"
        print(f"half-way: the {what} {release}; repeat it, {then}")
    elif platform.current() is None:
        print("nothing has been deployed yet")
    return 0
