"""What of the Tcl suite of redis 7.0 is left out, and why; and what other tests need besides the commands they are about."""

from __future__ import annotations

# These cannot pass where strings are the only type, and there is neither replication nor saving by command. A redis-server
# that lacks those commands passes all others (suite.py --lean).
NO_EVENTS = "keyspace notifications are not sent"
FIXED = "a segment's size is fixed: CONFIG SET maxmemory is refused, nothing is ever out of memory"
SETTINGS = "CONFIG has the settings that a segment has; most of them cannot be changed while it runs"
LONG_KEY = "a key of a segment has at most 4,096 bytes"
FROZEN = "time goes on while a script runs"
ENDED = "a script that runs too long is ended: nobody is told BUSY"
NO_MOVE = "a key stays in its database: there is neither MOVE nor SWAPDB"
NO_LIBRARY = "of the libraries there are bit, and encode, decode and null of cjson"
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
        "MOVE basic usage": NO_MOVE,
        "MOVE against key existing in the target DB": NO_MOVE,
        "MOVE against non-integer DB (#1428)": NO_MOVE,
        "MOVE can move key expire metadata as well": NO_MOVE,
        "MOVE does not create an expire if it does not exist": NO_MOVE,
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
        "SETBIT/BITFIELD only increase dirty when the value changed": "INFO has no rdb_changes_since_last_save",
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
        "MULTI and script timeout": ENDED,
        "EXEC and script timeout": ENDED,
        "MULTI-EXEC body and script timeout": ENDED,
        "just EXEC and script timeout": ENDED,
        "Blocking commands ignores the timeout": "needs lists, sorted sets, streams",
        "MULTI with SAVE": "needs SAVE",
        "SWAPDB is able to touch the watched keys that exist": NO_MOVE,
        "SWAPDB is able to touch the watched keys that do not exist": NO_MOVE,
        "SWAPDB does not touch watched stale keys": NO_MOVE,
        "SWAPDB does not touch non-existing key replaced with stale key": NO_MOVE,
        "SWAPDB does not touch stale key replaced with another stale key": NO_MOVE,
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
        "MONITOR can log commands issued by functions": "needs functions",
    },
    "unit/scripting": {
        "EVAL - Redis multi bulk -> Lua type conversion": "needs lists",
        "EVAL - Scripts can't run blpop command": "needs lists",
        "EVAL - Scripts can't run brpop command": "needs lists",
        "EVAL - Scripts can't run brpoplpush command": "needs lists",
        "EVAL - Scripts can't run blmove command": "needs lists",
        "EVAL - Scripts can't run bzpopmin command": "needs sorted sets",
        "EVAL - Scripts can't run bzpopmax command": "needs sorted sets",
        "EVAL - Scripts can't run XREAD and XREADGROUP with BLOCK option": "needs streams",
        "EVAL - redis.call variant raises a Lua error on Redis cmd error (1)": "needs lists",
        "SORT is normally not alpha re-ordered for the scripting engine": "needs sets",
        "SORT BY <constant> output gets ordered for scripting": "needs sets",
        "SORT BY <constant> with GET gets ordered for scripting": "needs sets",
        "Call Redis command with many args from Lua (issue #1764)": "needs lists",
        "Script check unpack with massive arguments": "needs lists",
        "Script with RESP3 map": "needs hashes",
        "CLUSTER RESET can not be invoke from within a script": "needs CLUSTER",
        "Script ACL check": "needs redis.acl_check_cmd",
        "Script block the time during execution": FROZEN,
        "Script delete the expired key": "DEBUG OBJECT does not find what has expired",
        "EVAL - JSON smoke test": NO_LIBRARY,
        "EVAL - cmsgpack can pack double?": NO_LIBRARY,
        "EVAL - cmsgpack can pack negative int64?": NO_LIBRARY,
        "EVAL - cmsgpack pack/unpack smoke test": NO_LIBRARY,
        "EVAL - cmsgpack can pack and unpack circular references?": NO_LIBRARY,
        "Try trick readonly table on cmsgpack table": NO_LIBRARY,
        "Timedout read-only scripts can be killed by SCRIPT KILL": ENDED,
        "Timedout read-only scripts can be killed by SCRIPT KILL even when use pcall": ENDED,
        "Timedout script does not cause a false dead client": ENDED,
        "Timedout script link is still usable after Lua returns": ENDED,
        "Script - disallow write on OOM": FIXED,
        "allow-oom shebang flag": FIXED,
        "reject script do not cause a Lua stack leak": FIXED,
        "Consistent eval error reporting": FIXED,
        "not enough good replicas": "needs replication",
        "LUA redis.error_reply API": "INFO errorstats has no counts",
        "LUA redis.error_reply API with empty string": "INFO errorstats has no counts",
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
    "unit/multi": {
        "EXEC fail on lazy expired WATCHed key": "DEBUG SET-ACTIVE-EXPIRE",
        "WATCH stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
        "Delete WATCHed stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
        "FLUSHDB while watching stale keys should not fail EXEC": "DEBUG SET-ACTIVE-EXPIRE",
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
        "CONFIG SET duplicate configs": "CONFIG SET maxmemory",
        "CONFIG SET set immutable": "CONFIG SET daemonize",
    },
}

# Of other projects' tests (others.py): those that fail, by patterns of their names, in each suite. They are run all the same.
NO_SHARDS = "sharded channels are of a cluster"
OTHERS: dict[str, dict[str, str]] = {
    "redis-py": {
        "*.TestRedisCommands.test_type *.test_asyncio.test_commands.TestRedisCommands.test_interrupted_command "
        "*.test_binary_lists *.test_blmove *.test_blmpop *.test_blpop *.test_br* *.test_command_getkeysandflags "
        "*.test_command_on_invalid_key_type *.test_exec_error_in_response *.test_lindex *.test_linsert *.test_list_encoding "
        "*.test_lists_with_byte_keys *.test_lists_with_memoryview_keys *.test_llen *.test_lmove *.test_lmpop *.test_lp* "
        "*.test_lrange *.test_lrem *.test_lset *.test_ltrim *.test_rp*": "needs lists",
        "*.test_acl_log *.test_hdel *.test_hexists *.test_hget_and_hset *.test_hget_and_hset_with_encodable_fields_and_values "
        "*.test_hgetall *.test_hincrby *.test_hincrbyfloat *.test_hkeys *.test_hlen *.test_hmget *.test_hmset *.test_hrandfield "
        "*.test_hscan *.test_hscan_iter *.test_hset_with_key_values_passed_as_list *.test_hset_with_multi_key_values "
        "*.test_hsetnx *.test_hstrlen *.test_hvals *.test_send_set_commands_over_async_pipeline "
        "*.test_send_set_commands_over_pipeline": "needs hashes",
        "*.test_sadd *.test_scan_type *.test_scard *.test_sdiff *.test_sdiffstore *.test_sint* *.test_sismember *.test_sm* "
        "*.test_spop *.test_spop_multi_value *.test_sr* *.test_sscan *.test_sscan_iter *.test_sunion *.test_sunionstore": "needs sets",
        "*.test_bz* *.test_floating_point_encoding *.test_pipeline *.test_za* *.test_zcard *.test_zcount *.test_zdiff "
        "*.test_zdiffstore *.test_zi* *.test_zlexcount *.test_zmpop *.test_zmscore *.test_zpopmax *.test_zpopmin "
        "*.test_zrandemember *.test_zrange *.test_zrange_params *.test_zrangebylex *.test_zrangebyscore *.test_zrangestore "
        "*.test_zrank *.test_zrem* *.test_zrevrang* *.test_zrevrank *.test_zscan *.test_zscan_iter *.test_zscore *.test_zu*": "needs sorted sets",
        "*.test_pf*": "needs HyperLogLogs",
        "*.test_geoadd *.test_geoadd_ch *.test_geoadd_nx *.test_geoadd_xx *.test_geodist *.test_geodist_missing_one_member "
        "*.test_geodist_units *.test_geohash *.test_geopos *.test_geopos_no_value *.test_geor* *.test_geosearch "
        "*.test_geosearch_member *.test_geosearch_sort *.test_geosearch_with *.test_geosearchstore *.test_geosearchstore_dist": "needs geo",
        "*.test_async_x* *.test_get_moveable_keys *.test_xack *.test_xad* *.test_xautoclaim *.test_xclaim *.test_xclaim_trimmed "
        "*.test_xdel *.test_xg* *.test_xinfo_stream *.test_xinfo_stream_full *.test_xlen *.test_xpending *.test_xpending_range "
        "*.test_xpending_range_idle *.test_xrange *.test_xread *.test_xreadgroup *.test_xrevrange *.test_xtrim "
        "*.test_xtrim_minlen_and_length_args": "needs streams",
        "*.test_binary_shard_channel_message_handler_with_subscription *.test_published_message_to_shard_channel "
        "tests.test_pubsub.TestPubSubSubscribeUnsubscribe.test_ignore_all_subscribe_messages "
        "tests.test_pubsub.TestPubSubSubscribeUnsubscribe.test_ignore_individual_subscribe_messages *.test_pubsub_shardchannels "
        "*.test_resubscribe_to_shard_channels_on_reconnection *.test_sha* *.test_sub_unsub_all_resub_shard_channels "
        "*.test_sub_unsub_resub_shard_channels *.test_subscribe_property_with_shard_channels "
        "*.test_unicode_shard_channel_message_handler": NO_SHARDS,
        "*.test_sort_*": "needs lists and sets",
        "*.test_acl_getuser_setuser": "needs hashes and geo: a category without commands is not told again",
        "*.test_function.TestFunction.*": "needs functions",
        "*.test_client_getredir *.test_client_tracking *.test_client_trackinginfo": "no client is told what has changed of what it keeps: there is no CLIENT TRACKING",
        "*.test_client_unblock": "no command blocks: there is no CLIENT UNBLOCK",
        "*.test_config_set_multi_params": FIXED,
        "*.test_eval_msgpack *.test_eval_msgpack_pipeline_error_in_lua": NO_LIBRARY,
        "*.test_memory_malloc_stats *.test_memory_stats": "a segment has statistics of its own: there is no MEMORY STATS",
        "*.test_command_list": "needs 300 commands, and those of lists",
        "*.test_module *.test_module_list *.test_module_loadex": "needs modules",
        "*.test_psync *.test_replicaof": "needs replication",
        "*.test_lolwut": "there is no LOLWUT",
        "*.test_busy_loading_from_pipeline": "DEBUG is refused in MULTI",
    },
    "django-redis": {
        "*.test_hash_* *.test_hdel *.test_hexists *.test_hkeys *.test_hlen *.test_hset": "needs hashes",
        "*.test_interstore *.test_sadd *.test_scard *.test_sdiff* *.test_sinter *.test_sismember *.test_smismember *.test_smove *.test_spop* "
        "*.test_srandmember* *.test_srem *.test_sscan* *.test_sunion*": "needs sets",
        "*.test_backend_sorted_sets.*": "needs sorted sets",
        "*.test_intenum[sqlite_msgpack]": "the client's msgpack gives an enum back as a number",
    },
    "redis-py --resp 3": {"*.test_push_handler_sharded_pubsub": NO_SHARDS},
}
