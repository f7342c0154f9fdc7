"""`python -m rollout.lint`: would a migration break the release that runs while it is applied?

It looks at the migrations on the main branch, which somebody may deploy; one that is not there yet
may still be changed at will. With the variable CI it looks at all of what is checked out: what main
is when a pull request is merged. It connects to no database: what depends on the one that a release
uses is left to the guard of `rollout deploy`, which looks at every migration to come.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ADVICE = {
    "NOT_NULL": "what runs leaves the column out: beside the default write one that the database"
    ' knows, db_default="" for a text, db_default=0 for a number; or null=True',
    "DROP_COLUMN": "what runs still reads it: deploy code that does not name it, then remove it",
    "DROP_TABLE": "what runs still reads it: deploy code without it, then delete it",
    "RENAME_COLUMN": 'what runs knows the old name: keep it with db_column="…"',
    "RENAME_TABLE": 'what runs knows the old name: keep it with db_table = "…" in Meta',
    "ALTER_COLUMN": "what runs may not fit the new type: add a field, fill it, then remove this",
}
IGNORE = (
    "A migration whose first operation is IgnoreMigration() of django_migration_linter has been"
    " looked at by you, and is left alone."
)


def on_main() -> set[tuple[str, str]]:
    """Return app and name of the migrations that git has on the main branch; of HEAD in CI."""
    main = ("origin/HEAD", "origin/main", "main", "master")
    branches = ("HEAD",) if os.environ.get("CI", "false") not in ("", "0", "false") else main
    for branch in branches if shutil.which("git") else ():
        command = ["git", "ls-tree", "-r", "--name-only", branch]
        listed = subprocess.run(command, capture_output=True, text=True)
        if listed.returncode == 0:
            paths = [Path(line) for line in listed.stdout.splitlines()]
            return {(p.parts[-3], p.stem) for p in paths if p.parts[-2:-1] == ("migrations",)}
    print("no migration was looked at: git knows no main branch here", file=sys.stderr)
    return set()


def issues() -> list[str]:
    """Say what would break, a line each."""
    from django.conf import settings
    from django.db import Error, connection
    from django.db.migrations.recorder import MigrationRecorder
    from django_migration_linter import MigrationLinter

    found: list[str] = []

    class Linter(MigrationLinter):
        def print_linting_msg(self, app: str, name: str, verdict: str, _: Any) -> None:
            self.current, self.verdict = f"{app} {name}", verdict

        def print_errors(self, errors: list[Any]) -> None:
            if self.verdict != "ERR":  # what a setting leaves out is printed like this as well
                return
            for error in errors:
                where = ".".join(filter(None, (error.table, error.column)))
                advice = ADVICE.get(error.code, "")
                found.append(": ".join(filter(None, (self.current, where, error.message, advice))))

        def get_sql(self, app_label: str, migration_name: str) -> list[str]:
            key = app_label, migration_name
            migration = self.migration_loader.disk_migrations[key]
            state = self.migration_loader.project_state(key, at_end=False)
            editor = connection.schema_editor(collect_sql=True, atomic=False)
            editor.deferred_sql = []
            vars(migration)["atomic"] = False  # a transaction would connect
            try:
                migration.apply(state, editor, collect_sql=True)
            except Error:  # it looks for what is in a database: the guard's business
                return []
            statements = [*editor.collected_sql, *map(str, editor.deferred_sql)]
            return "\n".join(statements).splitlines()

    # Nothing is asked of a server: what was applied, its version, how it quotes.
    MigrationRecorder.applied_migrations = lambda self: {}  # type: ignore[method-assign]
    connection.__dict__["pg_version"] = 160_000
    quote = connection.schema_editor(collect_sql=True).quote_value
    vars(connection.ops)["compose_sql"] = lambda sql, params: (
        sql % tuple(map(quote, params)) if params else sql
    )
    options = getattr(settings, "MIGRATION_LINTER_OPTIONS", {})
    linter = Linter(
        exclude_apps=options.get("exclude_apps"),
        exclude_migration_tests=options.get("exclude_migration_tests"),
        ignore_initial_migrations=True,
        all_warnings_as_errors=True,
        no_cache=True,
    )
    judged = on_main()
    for key, migration in sorted(linter.migration_loader.disk_migrations.items()):
        if (migration.__module__.split(".")[-3], key[1]) in judged:
            linter.lint_migration(migration)
    return found


def main() -> int:
    """Print what would break; return the exit code."""
    sys.path.insert(0, str(Path.cwd()))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    import django

    django.setup()
    if found := issues():
        print("\n".join([*found, IGNORE]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
