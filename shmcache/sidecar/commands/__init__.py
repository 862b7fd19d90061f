"""The commands that Python implements, by what they are about; table.py has them all, with those that are compiled.

- table.py: names, arity, flags, where the keys are; errors
- everywhere.py: what runs in every process
- acl.py, connection.py, transactions.py, keys.py, strings.py, bits.py, pubsub.py, server.py, info.py
"""

from shmcache.sidecar.commands import acl, bits, connection, info, keys, pubsub, server, strings, transactions  # each enters its commands
from shmcache.sidecar.commands.everywhere import PARTS
from shmcache.sidecar.commands.table import SETTINGS, TABLE, is_of_loop, table

__all__ = [
    "PARTS", "SETTINGS", "TABLE",
    "acl", "bits", "connection", "info", "is_of_loop", "keys", "pubsub", "server", "strings", "table", "transactions",
]  # fmt: skip
