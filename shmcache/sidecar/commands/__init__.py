"""The commands that Python implements, by what they are about; table.py has them all, with those that are compiled.

- table.py: names, arity, flags, where the keys are; errors
- everywhere.py: what runs in every process
- acl.py, connection.py, transactions.py, keys.py, strings.py, bits.py, leases.py, pubsub.py, scripting.py, server.py, info.py
"""

from shmcache.sidecar.commands import (  # each enters its commands
    acl,
    bits,
    connection,
    info,
    keys,
    leases,
    pubsub,
    scripting,
    server,
    strings,
    transactions,
)
from shmcache.sidecar.commands.everywhere import PARTS
from shmcache.sidecar.commands.table import SETTINGS, TABLE, WRITE, table, without_passwords

__all__ = [
    "PARTS", "SETTINGS", "TABLE", "WRITE",
    "acl", "bits", "connection", "info", "keys", "leases", "pubsub", "scripting", "server", "strings", "table", "transactions",
    "without_passwords",
]  # fmt: skip
