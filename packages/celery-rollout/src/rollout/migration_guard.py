"""Would the migrations to come break the release that still runs? `rollout.release check` asks it.

It looks at what the linter of `manage.py lintmigrations` does not: each column, index and
constraint by itself; and whether somebody has thought about Python and SQL of your own.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.migrations import RunPython, RunSQL, SeparateDatabaseAndState
from django.db.migrations.executor import MigrationExecutor
from django_migration_linter import IgnoreMigration

NAME = r'((?:"[^"]+"\.?)+)'
# What says nothing about a statement: values, which hold any words, and comments. Names are kept.
NOISE = re.compile(r"""("[^"]*")|'(?:[^']|'')*'|--[^\n]*""")
# What rewrites a table when a column is added to it, and holds everybody up for so long.
REWRITES = re.compile(
    r"GENERATED ALWAYS AS .* STORED|DEFAULT [^,]*(random|uuid|clock_timestamp|nextval)[^,]*\(",
    re.IGNORECASE,
)
# Not an index that is being built just now: `migrate` waits for the one who builds it.
UNFINISHED = """SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid AND NOT EXISTS
    (SELECT FROM pg_stat_progress_create_index
      WHERE index_relid = indexrelid AND datname = current_database())"""
INSTEAD = (
    "holds up who writes to it: AddIndexConcurrently; of a ForeignKey: db_index=False, and that in"
    " the next migration"
)
THOUGHT = (
    "nobody can tell what of it breaks what runs; in a migration of its own, whose first operation"
    " is IgnoreMigration(), you say that you have looked"
)


class Guard:
    """Reads the SQL of migrations, in their order: what they make themselves nobody uses yet."""

    def __init__(self) -> None:
        self.tables: set[str] = set()
        # Of each column that was added, by table and name: does it have a default?
        self.columns: dict[tuple[str, str], bool] = {}
        # Those added ones that the migration has made NOT NULL.
        self.required: set[tuple[str, str]] = set()

    def breaking(self, sql: str) -> list[str]:
        """Say what of a migration breaks what runs, a line each."""
        self.required.clear()
        found = []
        for text in NOISE.sub(r"\1", sql).split(";"):
            statement = " ".join(text.split())
            if match := re.match(f"CREATE TABLE {NAME}", statement):
                self.tables.add(match[1])
            elif match := re.match(f"CREATE (?:UNIQUE )?INDEX {NAME} ON {NAME}", statement):
                found.append((match[2], f"CREATE INDEX on {match[2]} {INSTEAD}"))
            elif match := re.match(f"ALTER TABLE {NAME} (.*)", statement):
                found += [(match[1], why) for why in self.altering(*match.groups())]
        found += [
            (table, f"NOT NULL {column} of {table} has no default, and what runs leaves it out")
            for table, column in sorted(self.required)
            if not self.columns[table, column]
        ]
        return [why for table, why in found if table not in self.tables]

    def altering(self, table: str, changes: str) -> Iterator[str]:
        """Say what an ALTER TABLE breaks; note what it does to columns that were added."""
        if match := re.match(f"ADD COLUMN {NAME} (.*)", changes):
            column, kind = match.groups()
            self.columns[table, column] = bool(re.search("DEFAULT (?!NULL)|GENERATED ", kind))
            if re.search("(?<!IS )NOT NULL", kind):
                self.required.add((table, column))
            if REWRITES.search(kind):
                yield f"the value of {column} rewrites {table}, which nobody can use meanwhile"
            if re.search(r"\bUNIQUE\b", kind):
                yield f"the index of {column} is built in {table}, which nobody can use meanwhile"
        for kind in re.findall(f"ADD CONSTRAINT {NAME} (?:CHECK|UNIQUE|EXCLUDE)", changes):
            yield f"ADD CONSTRAINT {kind} on {table}, which what runs may not keep to"
        pattern = f"ALTER COLUMN {NAME} (SET NOT NULL|SET DEFAULT|DROP DEFAULT)"
        for column, change in re.findall(pattern, changes):
            if (table, column) not in self.columns:
                if change != "SET DEFAULT":
                    yield f"{change} of {column} of {table}, which what runs may leave empty"
            elif change == "SET NOT NULL":
                self.required.add((table, column))
            else:
                self.columns[table, column] = change == "SET DEFAULT"


def unthought(operations: Iterable[Any]) -> Iterator[str]:
    """Return the names of operations that are Python or SQL of somebody's own."""
    for operation in operations:
        if isinstance(operation, SeparateDatabaseAndState):
            yield from unthought(operation.database_operations)
        elif isinstance(operation, (RunPython, RunSQL)):
            yield type(operation).__name__


def migrations() -> list[str]:
    """Return what of the migrations to come breaks the release that runs, a line each.

    And indexes that a migration has left behind unfinished, so that it cannot be repeated.
    """
    found: list[str] = []
    guard = Guard()
    left_out = getattr(settings, "MIGRATION_LINTER_OPTIONS", {}).get("exclude_apps", ())
    executor = MigrationExecutor(connection)
    for migration, _ in executor.migration_plan(executor.loader.graph.leaf_nodes()):
        ignored = any(isinstance(each, IgnoreMigration) for each in migration.operations)
        why = [f"{name}: {THOUGHT}" for name in sorted(set(unthought(migration.operations)))]
        try:
            why += guard.breaking("\n".join(executor.loader.collect_sql([(migration, False)])))
        except Exception as error:  # it may look for a constraint that one before it makes
            why.append(f"{error!r}: {THOUGHT}")
        if not ignored and migration.app_label not in left_out:
            found += [f"{migration}: {words}" for words in why]
    with connection.cursor() as cursor:
        cursor.execute(UNFINISHED)
        names = [name for (name,) in cursor.fetchall()]
    return found + [f"an index was not finished: DROP INDEX CONCURRENTLY {name}" for name in names]
