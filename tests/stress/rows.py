"""Each row that is stored, in order: a trigger in the database writes it down."""

from __future__ import annotations

import sqlalchemy as sa

import shmcache

VALUE = "CASE WHEN new.expires_at IS NULL THEN new.value END"  # of a tombstone NULL
STATEMENTS = {
    "sqlite": [
        "CREATE TABLE history (n INTEGER PRIMARY KEY, key BLOB, value BLOB, version INTEGER)",
        "CREATE TRIGGER stored AFTER INSERT ON {table} BEGIN INSERT INTO history (key, value, version) VALUES (new.key, {value}, new.version); END",
        "CREATE TRIGGER changed AFTER UPDATE ON {table} BEGIN INSERT INTO history (key, value, version) VALUES (new.key, {value}, new.version); END",
    ],
    "postgresql": [
        "CREATE TABLE history (n BIGSERIAL, key BYTEA, value BYTEA, version BIGINT)",
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO history (key, value, version) VALUES (new.key, {value}, new.version); RETURN new; END'",
        "CREATE TRIGGER stored AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION note()",
    ],
}


class History:
    """Of the table of its own of a store, which is made."""

    def __init__(self, url: str, table: str) -> None:
        store = shmcache.SQLStore(url, table)
        store.load_many([b"k"])  # makes the table
        store.close()
        self.engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with self.engine.begin() as c:
            for statement in STATEMENTS[url.partition(":")[0]]:
                c.exec_driver_sql(statement.format(table=table, value=VALUE))

    def taken(self) -> list[tuple[bytes, bytes | None, int]]:
        """(key, value: None of what was deleted, version) of what was stored since the last call."""
        with self.engine.begin() as c:
            found = c.exec_driver_sql("SELECT n, key, value, version FROM history ORDER BY n").all()
            if found:
                c.exec_driver_sql(f"DELETE FROM history WHERE n <= {found[-1][0]}")
        return [(bytes(key), None if value is None else bytes(value), version) for _, key, value, version in found]

    def close(self) -> None:
        self.engine.dispose()
