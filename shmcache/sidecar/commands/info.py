"""INFO: what each process counts (state), and all of it in Redis' sections."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import shmcache
from shmcache.sidecar import replies
from shmcache.sidecar.commands.everywhere import everywhere, part
from shmcache.sidecar.commands.pubsub import all_channels, all_patterns
from shmcache.sidecar.commands.table import REDIS_VERSION, command

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server

NOT_BY_DEFAULT = ("commandstats",)


@part
def state(server: Server) -> dict[str, Any]:
    """Of this process; its counts since it began, or since CONFIG RESETSTAT."""
    executor, usage = server.executor, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "worker": server.worker,
        "pid": os.getpid(),
        "began": server.began,  # unix time
        "clients": len(server.clients),
        "in_pubsub": sum(c.in_pubsub for c in server.clients.values()),
        "in_pool": server.in_pool,  # commands
        "paused": sum(client.retried_by_pause is not None for client in server.clients.values()),
        "waiting": len(server.waiting),  # clients whose replies wait for the disk
        "buffer_bytes": sum(c.memory for c in server.clients.values()),
        "accepted": server.accepted,
        "refused": server.refused,
        "commands": executor.commands,
        "commands_per_s": server.rate(),
        "bytes_in": executor.bytes_in,
        "bytes_out": executor.bytes_out,
        "errors": executor.errors,  # error replies by their first word
        "by_command": executor.command_stats(),  # name: calls, nanoseconds, rejected, failed
        "lag_s": server.lag,  # of the loop
        "worst_lag_s": server.worst_lag,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
    }


@command("info", -1, group="server")
def info(client: Connection, arguments: list[bytes]) -> bytes | None:
    wanted = [a.decode("latin-1").lower() for a in arguments] or ["default"]
    server, protocol = client.server, client.protocol
    return everywhere(client, state, [], lambda states: replies.verbatim("\r\n".join(sections_of(server, states, wanted)), protocol))


def human(n: float) -> str:
    for unit_name in ("B", "K", "M", "G"):
        if n < 1024:
            return f"{n:.2f}{unit_name}"
        n /= 1024
    return f"{n:.2f}T"


def summed(dicts: list[dict[Any, Any]]) -> dict[Any, Any]:
    """Of numbers, or of rows of numbers."""
    total: dict[Any, Any] = {}
    for each in dicts:
        for name, n in each.items():
            was = total.get(name)
            total[name] = n if was is None else was + n if isinstance(n, int) else [a + b for a, b in zip(was, n, strict=True)]
    return dict(sorted(total.items()))


def sections_of(server: Server, states: list[dict[str, Any]], wanted: list[str]) -> Iterator[str]:
    """Each that is wanted, as text. states: of all processes, this one's first."""
    sections = all_sections(server, states)
    default = [s for s in sections if s not in NOT_BY_DEFAULT]
    chosen = []
    for name in wanted:
        chosen += default if name == "default" else list(sections) if name in ("all", "everything") else [name] if name in sections else []
    if "keyspace" in chosen:
        sections["keyspace"] = keyspace(server)
    for name in dict.fromkeys(chosen):
        title = "CPU" if name == "cpu" else name.capitalize()
        yield "\r\n".join([f"# {title}", *(f"{k}:{v}" for k, v in sections[name].items()), ""])


def keyspace(server: Server) -> dict[str, str]:
    """Of databases beyond the 16th nothing is said."""
    return {f"db{d}": f"keys={items},expires={expiring},avg_ttl=0" for d, (items, expiring) in server.executor.sizes().items()}


def all_sections(server: Server, states: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cache, now = server.cache, time.time()
    header, counters, durability = cache.segment.header, cache.counters(), cache.durability()
    size = int(header["size_bytes"])
    used = size - int(header["pages_n_free"]) * (1 << int(header["page_shift"]))
    rss = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()  # noqa: SIM115
    uptime = int(now - min(s["began"] for s in states))
    writing, logged = durability["snapshot_writing_s"], durability["log"] != "off"
    errors = summed([s["errors"] for s in states])

    def total(name: str) -> Any:
        return sum(s[name] for s in states)

    return {
        "server": {
            "redis_version": REDIS_VERSION,
            "shmcache_version": shmcache.__version__,
            "redis_git_sha1": "00000000",
            "redis_git_dirty": 0,
            "redis_mode": "standalone",
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
            "arch_bits": 64,
            "multiplexing_api": "epoll",
            "process_id": os.getpid(),
            "run_id": f"{int(header['created_ms']):040x}",
            "tcp_port": server.settings["port"],
            "server_time_usec": int(now * 1e6),
            "uptime_in_seconds": uptime,
            "uptime_in_days": uptime // 86400,
            "hz": 10,
            "configured_hz": 10,
            "executable": sys.executable,
            "config_file": "",
            "segment": server.name,
            "worker": server.worker,
            "workers": server.of_workers,
            "workers_counted": len(states),  # below
        },
        "clients": {
            "connected_clients": total("clients"),
            "maxclients": server.settings["maxclients"],
            "blocked_clients": total("in_pool") + total("paused"),
            "pubsub_clients": total("in_pubsub"),
            "clients_waiting_for_the_disk": total("waiting"),
        },
        "memory": {
            "used_memory": used,
            "used_memory_human": human(used),
            "used_memory_rss": rss,
            "used_memory_rss_human": human(rss),
            "used_memory_peak": used,
            "used_memory_peak_human": human(used),
            "total_system_memory": os.sysconf("SC_PHYS_PAGES") * resource.getpagesize(),
            "maxmemory": size,
            "maxmemory_human": human(size),
            "maxmemory_policy": server.settings["maxmemory-policy"],
            "mem_fragmentation_ratio": 1.0,
            "mem_allocator": "shmcache",
            "number_of_cached_scripts": len(server.scripts.known),
            "mem_clients_normal": total("buffer_bytes"),
        },
        "persistence": {
            "loading": int(durability["restoring"]),
            "rdb_bgsave_in_progress": int(writing is not None),
            "rdb_last_save_time": int(header["snapshot_ms"]) // 1000,
            "rdb_last_bgsave_status": "err" if durability["snapshot_failed"] else "ok",
            "rdb_current_bgsave_time_sec": -1 if writing is None else int(writing),
            "aof_enabled": int(logged),
            "aof_rewrite_in_progress": int(logged and writing is not None),
            "aof_rewrite_scheduled": 0,
            "aof_last_bgrewrite_status": "err" if durability["snapshot_failed"] else "ok",
            "aof_last_write_status": "err" if durability["log_failed"] else "ok",
            "aof_buffer_length": durability["log_waiting_bytes"],
            "log_policy": durability["log"],
            "log_gaps": durability["log_gaps"],
        },
        "stats": {
            "total_connections_received": total("accepted"),
            "total_commands_processed": total("commands"),
            "instantaneous_ops_per_sec": total("commands_per_s"),
            "total_net_input_bytes": total("bytes_in"),
            "total_net_output_bytes": total("bytes_out"),
            "rejected_connections": total("refused"),
            "expired_keys": counters["expirations"],
            "evicted_keys": counters["evictions"],
            "keyspace_hits": counters["hits"],
            "keyspace_misses": counters["misses"],
            "pubsub_channels": len(all_channels(server)),
            "pubsub_patterns": len(all_patterns(server)),
            "total_error_replies": sum(errors.values()),
            "event_loop_lag_ms": round(max(s["lag_s"] for s in states) * 1000, 3),
            "event_loop_worst_lag_ms": round(max(s["worst_lag_s"] for s in states) * 1000, 3),
        },
        "replication": {
            "role": "master",
            "connected_slaves": 0,
            "master_failover_state": "no-failover",
            "master_repl_offset": 0,
            "repl_backlog_active": 0,
        },
        "cpu": {
            "used_cpu_sys": f"{total('system_s'):.6f}",
            "used_cpu_user": f"{total('user_s'):.6f}",
            "used_cpu_sys_children": "0.000000",
            "used_cpu_user_children": "0.000000",
        },
        "modules": {},
        "errorstats": {f"errorstat_{word.decode('latin-1')}": f"count={n}" for word, n in errors.items()},
        "cluster": {"cluster_enabled": 0},
        "keyspace": {},  # sections_of() fills it if it is wanted, for each stripe is asked
        "commandstats": {
            f"cmdstat_{name}": f"calls={calls},usec={ns // 1000},usec_per_call={ns / 1000 / max(1, calls):.2f},"
            f"rejected_calls={rejected},failed_calls={failed}"
            for name, (calls, ns, rejected, failed) in summed([s["by_command"] for s in states]).items()
        },
    }
