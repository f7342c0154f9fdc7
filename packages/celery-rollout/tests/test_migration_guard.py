"""What of a migration breaks the release that still runs: Django's own SQL is read for it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.contrib.postgres.constraints import ExclusionConstraint
from django.contrib.postgres.functions import RandomUUID
from django.core.management import call_command
from django.db import connection
from django.db import models as m
from django.db.migrations import (
    AddConstraint,
    AddField,
    AddIndex,
    AlterField,
    CreateModel,
    Migration,
)
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.db.models.functions import Now
from django.test import modify_settings

from rollout.migration_guard import Guard, migrations
from rollout.release import BREAKING, LINT, MAKE, NO_MIGRATION, complaints
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db
ID = ("id", m.BigAutoField(primary_key=True))
THERE = CreateModel(
    "wanted",
    [
        ID,
        ("key", m.UUIDField()),
        ("old", m.IntegerField(null=True)),
        ("filled", m.IntegerField(db_default=1)),
    ],
)
NEW = CreateModel("kind", [ID, ("name", m.CharField(max_length=9)), ("old", m.IntegerField())])


def sql(*operations: Operation) -> str:
    """Return the SQL of a migration of the app in which the model `wanted` is there already."""
    before, migration = Migration("0001", "shop"), Migration("0002", "shop")
    before.operations, migration.operations = [THERE], list(operations)
    state = before.mutate_state(ProjectState())
    with connection.schema_editor(collect_sql=True, atomic=False) as editor:
        migration.apply(state, editor, collect_sql=True)
    return "\n".join(editor.collected_sql)


def added(name: str, field: m.Field) -> Operation:
    return AddField("wanted", name, field)


def unique(model: str) -> Operation:
    return AddConstraint(model, m.UniqueConstraint(fields=["old"], name=f"{model}_once"))


def index(model: str) -> Operation:
    return AddIndex(model, m.Index("old", name=f"{model}_by_old"))


def kind(**how: Any) -> m.Field:
    return m.ForeignKey("shop.kind", m.CASCADE, null=True, **how)


EXTRA = added("extra", m.IntegerField(db_default=0))
NOTE = added("note", m.CharField(max_length=9, default=""))
OTHER_DEFAULT = AlterField("wanted", "filled", m.IntegerField(db_default=2))
EXCLUSION = ExclusionConstraint(name="apart", expressions=[("old", "=")])
MODEL = (
    "m.CreateModel('kind', [('a', f.IntegerField(primary_key=True)), ('b', f.IntegerField())],"
    " options={'unique_together': {('a', 'b')}})"
)
AMOUNT = m.Q(old__lt=3)


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ([EXTRA], []),
        ([added("note", m.IntegerField(null=True))], []),
        ([added("note", m.IntegerField(null=True, default=3))], []),
        ([NOTE], ['NOT NULL "note"']),
        # The linter takes one default of a migration for that of each column.
        ([NOTE, EXTRA], ['NOT NULL "note"']),
        ([AlterField("wanted", "old", m.IntegerField(db_default=0))], ['SET NOT NULL of "old"']),
        (
            [AlterField("wanted", "old", m.IntegerField(default=0)), OTHER_DEFAULT],
            ['SET NOT NULL of "old"', 'DROP DEFAULT of "old"'],
        ),
        ([OTHER_DEFAULT], []),
        ([AlterField("wanted", "filled", m.IntegerField())], ['DROP DEFAULT of "filled"']),
        # Nobody uses yet what the same migration has added.
        (
            [
                added("soon", m.IntegerField(null=True)),
                AlterField("wanted", "soon", m.IntegerField(db_default=0)),
            ],
            [],
        ),
        ([NEW, AddField("kind", "note", m.IntegerField(default=1))], []),
        # The linter looks at the first index and the first constraint.
        ([index("wanted")], ["CREATE INDEX"]),
        ([NEW, index("kind"), index("wanted")], ["CREATE INDEX"]),
        ([NEW, added("kind", kind())], ["CREATE INDEX"]),
        ([NEW, added("kind", kind(db_index=False))], []),
        ([NEW, unique("kind")], []),
        ([NEW, unique("kind"), unique("wanted")], ['ADD CONSTRAINT "wanted_once"']),
        ([AddConstraint("wanted", EXCLUSION)], ['ADD CONSTRAINT "apart"']),
        (
            [AddConstraint("wanted", m.CheckConstraint(condition=AMOUNT, name="few"))],
            ['ADD CONSTRAINT "few"'],
        ),
        ([added("code", m.IntegerField(null=True, unique=True))], ['the index of "code"']),
        # Only what is added rewrites the table.
        ([added("other", m.UUIDField(db_default=RandomUUID()))], ['the value of "other"']),
        ([AlterField("wanted", "key", m.UUIDField(db_default=RandomUUID()))], []),
        ([added("word", m.CharField(max_length=20, db_default="random (it's; one)"))], []),
        ([added("word", m.CharField(max_length=20, db_default='a "b" NOT NULL'))], []),
        ([added("at", m.DateTimeField(db_default=Now()))], []),
        (
            [
                added(
                    "sum",
                    m.GeneratedField(
                        expression=m.F("filled") + 1, output_field=m.IntegerField(), db_persist=True
                    ),
                )
            ],
            ['the value of "sum"'],
        ),
    ],
)
def test_what_breaks_the_running_release_is_found(
    operations: list[Operation], words: list[str]
) -> None:
    found = Guard().breaking(sql(*operations))
    assert len(found) == len(words), found
    assert all(line.startswith(part) for line, part in zip(found, words, strict=True)), found


def test_an_index_that_is_built_concurrently_may_be_added() -> None:
    made = sql(index("wanted"))
    assert Guard().breaking(made.replace("INDEX", "INDEX CONCURRENTLY")) == []


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of migrations of an app whose first one has been applied."""
    folder = tmp_path / "shop" / "migrations"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    write(folder, "0001", "m.CreateModel('wanted', [('old', f.IntegerField(primary_key=True))])")
    with modify_settings(INSTALLED_APPS={"append": "shop"}):
        call_command("migrate", "shop", verbosity=0)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def write(folder: Path, name: str, operations: str) -> None:
    """Write a migration that depends on the one with the number before it."""
    before = [("shop", f"{int(name) - 1:04}")] if name != "0001" else []
    sys.modules.pop(f"shop.migrations.{name}", None)
    (folder / f"{name}.py").write_text(
        "from django.db import migrations as m, models as f\n"
        "from django_migration_linter import IgnoreMigration\n"
        "class Migration(m.Migration):\n"
        f"    dependencies = {before}\n"
        f"    operations = [{operations}]\n"
    )


@pytest.mark.parametrize(
    "operation",
    [
        "m.RunPython(lambda apps, schema_editor: None, m.RunPython.noop)",
        "m.RunSQL('update shop_wanted set old = 1', m.RunSQL.noop)",
        "m.SeparateDatabaseAndState([m.RunSQL('select 1', 'select 1')])",
    ],
)
def test_python_and_sql_of_your_own_wants_a_word_from_you(shop: Path, operation: str) -> None:
    write(shop, "0002", operation)
    (line,) = migrations()
    assert line.startswith("shop.0002: Run")
    assert "IgnoreMigration()" in line
    write(shop, "0002", f"IgnoreMigration(), {operation}")
    assert migrations() == []


def test_what_an_ignored_migration_makes_is_new_too(shop: Path) -> None:
    write(shop, "0002", f"IgnoreMigration(), {MODEL}")
    write(shop, "0003", "m.AddIndex('kind', f.Index(f.F('a'), name='by_a'))")
    assert migrations() == []


def test_a_migration_without_sql_is_refused_in_words(shop: Path) -> None:
    write(shop, "0002", MODEL)
    write(shop, "0003", "m.AlterUniqueTogether('kind', set())")  # looks for what 0002 will make
    (line,) = migrations()
    assert line.startswith("shop.0003: ValueError('Found wrong number (0) of constraints")
    assert "IgnoreMigration()" in line
    write(shop, "0003", "IgnoreMigration(), m.AlterUniqueTogether('kind', set())")
    assert migrations() == []


def test_a_model_without_its_migration_and_what_the_linter_finds_are_told(shop: Path) -> None:
    why, *lines = complaints(NO_MIGRATION, MAKE)
    assert why == NO_MIGRATION
    assert any("Delete model wanted" in line for line in lines)  # the app has no such model
    assert complaints(BREAKING, LINT) == []
    write(shop, "0002", "m.DeleteModel('wanted')")
    assert complaints(NO_MIGRATION, MAKE) == []
    why, *lines = complaints(BREAKING, LINT)
    assert why == BREAKING
    assert any("DROPPING table" in line for line in lines), lines
    assert not any("Valid" in line for line in lines), lines


@pytest.mark.django_db(transaction=True)
def test_an_index_is_unfinished_only_when_nobody_builds_it(
    project_environment: dict[str, str],
) -> None:
    url = project_environment["DATABASE_URL"]
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE half (a int)")
        try:
            with psycopg.connect(url) as writer, psycopg.connect(url, autocommit=True) as builder:
                writer.execute("INSERT INTO half VALUES (1)")  # the index has to wait for it
                building = threading.Thread(target=build, args=[builder])
                building.start()
                begun = "SELECT 1 FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"
                wait_until(lambda: cursor.execute(begun) and cursor.fetchone(), what="it is built")
                meanwhile = migrations()
                builder.cancel()
                building.join(30)
            assert meanwhile == []
            assert migrations() == ["an index was not finished: DROP INDEX CONCURRENTLY half_a"]
        finally:
            cursor.execute("DROP TABLE half")


def build(builder: psycopg.Connection) -> None:
    with suppress(psycopg.errors.QueryCanceled):
        builder.execute("CREATE INDEX CONCURRENTLY half_a ON half (a)")
