"""What of the Tcl suite of redis 7.0 is left out, and why; and what other tests need besides the commands they are about."""

from __future__ import annotations

# These cannot pass where strings are the only type, and there is neither replication nor scripting nor saving by command. A redis-server
# that lacks those commands passes all others (suite.py --lean).
NO_EVENTS = "keyspace notifications are not sent"
FIXED = "a segment's size is fixed: CONFIG SET maxmemory is refused, nothing is ever out of memory"
SETTINGS = "CONFIG has the settings that a segment has; most of them cannot be changed while it runs"
LONG_KEY = "a key of a segment has at most 4,096 bytes"
DENIED: dict[str, dict[str, str]] = {
    "unit/type/string": {
        "MGET against non-string key": "needs sets",
        "SETBIT against key with wrong type": "needs lists",
        "SETRANGE against key with wrong type": "needs lists",
        "Extended SET GET with incorrect type should result in wrong type error": "needs lists",
    },
    "unit/type/incr": {
        "INCR fails against a key holding a list": "needs lists",
        "INCRBYFLOAT fails against a key holding a list": "needs lists",
    },
    "unit/expire": {
        "EXPIRE - write on expire should work": "needs lists",
        "SCAN: Lazy-expire should not be wrapped in MULTI/EXEC": "needs replication",
        "RANDOMKEY: Lazy-expire should not be wrapped in MULTI/EXEC": "needs replication",
    },
    "unit/keyspace": {
        "Regression for pattern matching very long nested loops": LONG_KEY,
        "COPY basic usage for list": "needs lists",
        "COPY basic usage for intset set": "needs sets",
        "COPY basic usage for hashtable set": "needs sets",
        "COPY basic usage for listpack sorted set": "needs sorted sets",
        "COPY basic usage for skiplist sorted set": "needs sorted sets",
        "COPY basic usage for listpack hash": "needs hashes",
        "COPY basic usage for hashtable hash": "needs hashes",
        "COPY basic usage for stream": "needs streams",
        "COPY basic usage for stream-cgroups": "needs streams",
    },
    "unit/scan": {
        "SSCAN with encoding intset": "needs sets",
        "SSCAN with encoding hashtable": "needs sets",
        "HSCAN with encoding listpack": "needs hashes",
        "HSCAN with encoding hashtable": "needs hashes",
        "ZSCAN with encoding listpack": "needs sorted sets",
        "ZSCAN with encoding skiplist": "needs sorted sets",
        "SSCAN with integer encoded object (issue #1345)": "needs sets",
        "SSCAN with PATTERN": "needs sets",
        "HSCAN with PATTERN": "needs hashes",
        "ZSCAN with PATTERN": "needs sorted sets",
        "ZSCAN scores: regression test for issue #2175": "needs sorted sets",
        "SCAN regression test for issue #4906": "needs sets",
    },
    "unit/bitops": {
        "BITOP with non string source key": "needs lists",
    },
    "unit/multi": {
        "EXEC fails if there are errors while queueing commands #2": FIXED,
        "DISCARD should not fail during OOM": FIXED,
        "EXEC with only read commands should not be rejected when OOM": FIXED,
        "EXEC with at least one use-memory command should fail": FIXED,
        "MULTI / EXEC basics": "needs lists",
        "DISCARD": "needs lists",
        "MULTI where commands alter argc/argv": "needs sets",
        "EXEC fail on WATCHed key modified by SORT with STORE even if the result is empty": "needs lists",
        "MULTI and script timeout": "needs scripts",
        "EXEC and script timeout": "needs scripts",
        "MULTI-EXEC body and script timeout": "needs scripts",
        "just EXEC and script timeout": "needs scripts",
        "Blocking commands ignores the timeout": "needs lists, sorted sets, streams",
        "MULTI with SAVE": "needs SAVE",
    },
    "unit/pubsub": {
        "Keyspace notifications: we receive keyspace notifications": NO_EVENTS,
        "Keyspace notifications: we receive keyevent notifications": NO_EVENTS,
        "Keyspace notifications: we can receive both kind of events": NO_EVENTS,
        "Keyspace notifications: we are able to mask events": NO_EVENTS,
        "Keyspace notifications: general events test": NO_EVENTS,
        "Keyspace notifications: list events test": NO_EVENTS,
        "Keyspace notifications: set events test": NO_EVENTS,
        "Keyspace notifications: zset events test": NO_EVENTS,
        "Keyspace notifications: hash events test": NO_EVENTS,
        "Keyspace notifications: stream events test": NO_EVENTS,
        "Keyspace notifications: expired events (triggered expire)": NO_EVENTS,
        "Keyspace notifications: expired events (background expire)": NO_EVENTS,
        "Keyspace notifications: evicted events": NO_EVENTS,
        "Keyspace notifications: test CONFIG GET/SET of event flags": NO_EVENTS,
        "Keyspace notifications: new key test": NO_EVENTS,
    },
    "unit/protocol": {
        "raw protocol response": "needs sets",
        "raw protocol response - deferred": "needs sets",
        "raw protocol response - multiline": "needs sets",
        "Regression for a crash with blocking ops and pipelining": "needs lists",
    },
    "unit/introspection": {
        "CONFIG save params special case handled properly": SETTINGS,
        "CONFIG sanity": SETTINGS,
        "CONFIG SET with multiple args": SETTINGS,
        "CONFIG SET rollback on set error": SETTINGS,
        "CONFIG SET rollback on apply error": SETTINGS,
        "CONFIG GET hidden configs": SETTINGS,
        "CONFIG GET multiple args": SETTINGS,
        "MONITOR can log commands issued by the scripting engine": "needs scripts",
        "MONITOR can log commands issued by functions": "needs scripts",
    },
}

# These are run. What is named beside them has to be there; it is printed with a failure.
NEEDS: dict[str, dict[str, str]] = {
    "unit/type/string": {
        "SETBIT against integer-encoded key": "OBJECT ENCODING",
        "GETBIT against integer-encoded key": "OBJECT ENCODING",
        "SETRANGE against integer-encoded key": "OBJECT ENCODING",
        "trim on SET with big value": "INFO mem_allocator (only run if it is jemalloc), MEMORY USAGE",
    },
    "unit/type/incr": {
        "INCR uses shared objects in the 0-9999 range": "OBJECT REFCOUNT",
        "INCR can modify objects in-place": "DEBUG OBJECT, OBJECT REFCOUNT",
    },
    "unit/expire": {
        "Redis should lazy expire keys": "DEBUG SET-ACTIVE-EXPIRE",
        "EXPIRE should not resurrect keys (issue #1026)": "DEBUG SET-ACTIVE-EXPIRE",
        "SET - use KEEPTTL option, TTL should not be removed after loadaof": "CONFIG SET appendonly, DEBUG LOADAOF",
        "GETEX use of PERSIST option should remove TTL after loadaof": "DEBUG LOADAOF",
    },
    "unit/keyspace": {
        "DEL against expired key": "DEBUG SET-ACTIVE-EXPIRE",
    },
    "unit/bitops": {
        "SETBIT/BITFIELD only increase dirty when the value changed": "INFO rdb_changes_since_last_save",
    },
    "unit/multi": {
        "EXEC fails if there are errors while queueing commands #2": "CONFIG SET maxmemory",
        "EXEC fail on lazy expired WATCHed key": "DEBUG SET-ACTIVE-EXPIRE",
        "WATCH stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
        "Delete WATCHed stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
        "FLUSHDB while watching stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
        "DISCARD should not fail during OOM": "CONFIG SET maxmemory",
        "EXEC with only read commands should not be rejected when OOM": "CONFIG SET maxmemory",
        "EXEC with at least one use-memory command should fail": "CONFIG SET maxmemory",
        "MULTI with SHUTDOWN": "SHUTDOWN, refused in MULTI",
        "MULTI with config error": "CONFIG SET maxmemory",
    },
    "unit/pubsub": {
        "Pub/Sub PING": "SUBSCRIBE",
        "PUBLISH/SUBSCRIBE basics": "SUBSCRIBE",
        "PUBLISH/SUBSCRIBE with two clients": "SUBSCRIBE",
        "PUBLISH/SUBSCRIBE after UNSUBSCRIBE without arguments": "SUBSCRIBE",
        "SUBSCRIBE to one channel more than once": "SUBSCRIBE",
        "PUBLISH/PSUBSCRIBE basics": "PSUBSCRIBE",
        "PUBLISH/PSUBSCRIBE with two clients": "PSUBSCRIBE",
        "PUBLISH/PSUBSCRIBE after PUNSUBSCRIBE without arguments": "PSUBSCRIBE",
        "PubSub messages with CLIENT REPLY OFF": "CLIENT REPLY, HELLO, PSUBSCRIBE, SUBSCRIBE",
        "NUMSUB returns numbers, not strings (#1561)": "PUBSUB NUMSUB",
        "NUMPATs returns the number of unique patterns": "PSUBSCRIBE, PUBSUB NUMPAT",
        "Mix SUBSCRIBE and PSUBSCRIBE": "PSUBSCRIBE, SUBSCRIBE",
        "Keyspace notifications: we receive keyspace notifications": "CLIENT REPLY, CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: we receive keyevent notifications": "CLIENT REPLY, CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: we can receive both kind of events": "CLIENT REPLY, CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: general events test": "CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: expired events (triggered expire)": "CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: expired events (background expire)": "CONFIG SET notify-keyspace-events, PSUBSCRIBE",
        "Keyspace notifications: evicted events": (
            "CONFIG SET maxmemory-policy, CONFIG SET maxmemory, CONFIG SET notify-keyspace-events, PSUBSCRIBE"
        ),
        "Keyspace notifications: test CONFIG GET/SET of event flags": (
            "CONFIG GET notify-keyspace-events, CONFIG SET notify-keyspace-events"
        ),
        "Keyspace notifications: new key test": "CONFIG SET notify-keyspace-events, PSUBSCRIBE",
    },
    "unit/protocol": {
        "RESP3 attributes": "DEBUG PROTOCOL ATTRIB, HELLO",
        "RESP3 attributes readraw": "DEBUG PROTOCOL ATTRIB, HELLO",
        "RESP3 attributes on RESP2": "DEBUG PROTOCOL ATTRIB, HELLO",
        "test big number parsing": "DEBUG PROTOCOL BIGNUM, HELLO",
        "test bool parsing": "DEBUG PROTOCOL FALSE, DEBUG PROTOCOL TRUE, HELLO",
        "test verbatim str parsing": "DEBUG PROTOCOL VERBATIM, HELLO",
    },
    "unit/introspection": {
        "CLIENT LIST": "CLIENT LIST",
        "CLIENT LIST with IDs": "CLIENT ID, CLIENT LIST",
        "CLIENT INFO": "CLIENT INFO",
        "CLIENT KILL with illegal arguments": "CLIENT KILL",
        "CLIENT KILL SKIPME YES/NO will kill all clients": "CLIENT KILL, INFO connected_clients",
        "CLIENT REPLY OFF/ON: disable all commands reply": "CLIENT REPLY",
        "CLIENT REPLY SKIP: skip the next command reply": "CLIENT REPLY",
        "CLIENT REPLY ON: unset SKIP flag": "CLIENT REPLY",
        "MONITOR can log executed commands": "MONITOR",
        "MONITOR correctly handles multi-exec cases": "MONITOR",
        "CLIENT GETNAME should return NIL if name is not assigned": "CLIENT GETNAME",
        "CLIENT LIST shows empty fields for unassigned names": "CLIENT LIST",
        "CLIENT SETNAME does not accept spaces": "CLIENT SETNAME",
        "CLIENT SETNAME can assign a name to this connection": "CLIENT LIST, CLIENT SETNAME",
        "CLIENT SETNAME can change the name of an existing connection": "CLIENT LIST, CLIENT SETNAME",
        "After CLIENT SETNAME, connection can still be closed": "CLIENT LIST, CLIENT SETNAME",
        "CONFIG sanity": "CONFIG GET *, CONFIG SET of every setting, to the value it has",
        "CONFIG SET with multiple args": "CONFIG GET maxmemory, CONFIG GET repl-backlog-size, CONFIG GET save, CONFIG SET maxmemory",
        "CONFIG SET rollback on set error": (
            "CONFIG GET client-query-buffer-limit, CONFIG GET maxmemory, CONFIG GET maxmemory-clients, CONFIG SET maxmemory"
        ),
        "CONFIG SET rollback on apply error": (
            "CONFIG GET client-query-buffer-limit, CONFIG GET maxmemory, CONFIG GET port, CONFIG SET maxmemory"
        ),
        "CONFIG SET duplicate configs": "CONFIG SET maxmemory",
        "CONFIG SET set immutable": "CONFIG SET daemonize",
        "CONFIG GET hidden configs": "CONFIG GET *, CONFIG GET key-load-delay",
        "CONFIG GET multiple args": "CONFIG GET maxmemory",
    },
}
