"""The commands that Python implements, by what they are about; table.py has them all, with those that are compiled.

    table.py         names, arity, flags, where the keys are; errors
    everywhere.py    what runs in every process
    connection.py    SELECT, AUTH, HELLO, CLIENT
    transactions.py  MULTI, EXEC, WATCH
    keys.py          those of any key, DUMP, SCAN, FLUSHDB
    strings.py       INCRBYFLOAT, LCS
    bits.py          BITCOUNT, BITFIELD, BITOP, BITPOS
    leases.py        LEASE.GET, LEASE.FILL, LEASE.RELEASE
    pubsub.py        SUBSCRIBE, PUBLISH, PUBSUB, MONITOR
    scripting.py     EVAL, SCRIPT
    server.py        CONFIG, COMMAND, SLOWLOG, DEBUG
    info.py          INFO
    acl.py           ACL
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
