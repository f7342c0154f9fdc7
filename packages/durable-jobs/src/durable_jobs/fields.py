"""`SentJSON`: JSON as it was sent, which `jsonb` is not: it sorts keys and writes numbers anew."""

import json
from typing import Any

from django.db import models
from django.db.models.expressions import Col


class _Compared(Col):
    """The column where it is compared or grouped by, which the type `json` cannot be."""

    def as_postgresql(self, compiler: Any, connection: Any) -> Any:
        sql, params = self.as_sql(compiler, connection)
        return f"{sql}::jsonb", params


class SentJSON(models.JSONField):
    """A `JSONField` whose text stays as it is; filters and lookups see it as `jsonb`."""

    def db_type(self, connection: Any) -> str | None:
        return "json" if connection.vendor == "postgresql" else super().db_type(connection)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        if connection.vendor != "postgresql" or value is None:
            return super().get_db_prep_value(value, connection, prepared)
        return json.dumps(value, cls=self.encoder)  # a `jsonb` would have lost the order already

    def get_col(self, alias: str, output_field: Any = None) -> Any:
        return _Compared(alias, self, output_field or self)

    @property
    def cached_col(self) -> Any:
        return _Compared(self.model._meta.db_table, self)

    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        # As text, because psycopg would decode a `json` by itself, as it does no `jsonb`.
        return f"{sql.removesuffix('::jsonb')}::text" if "::jsonb" in sql else sql, params

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        if not isinstance(value, str):  # of `raw()`, which psycopg has decoded
            return value
        return super().from_db_value(value, expression, connection)
