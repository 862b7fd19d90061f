"""What is seen of `shmcache serve`: INFO, CLIENT, MONITOR, SLOWLOG of all its processes, from each of them; metrics; serving() in a program."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

import shmcache
from shmcache.sidecar import serving
from shmcache.sidecar.bus import ANSWER_LIMIT
from tests.integration.service import LIMIT, until
from tests.redis.servers import free_port

TOOLS = Path(shmcache.__file__).parents[1] / "tools"


def pid_of(client):
    return client.info("server")["process_id"]


def one_of_each(service):
    """{pid: a client with one connection, to that process}, all processes knowing of each other."""
    found = {}

    def all_found():
        client = service.client(single_connection_client=True, retry=None)
        server = client.info("server")
        found.setdefault(server["process_id"], client)
        return len(found) == server["workers"] == server["workers_counted"]

    until(all_found)
    return found


@pytest.fixture
def pair(serve):
    """(service, a client of the one process, a client of the other)."""
    service = serve("--workers", "2")
    clients = one_of_each(service)
    yield service, *clients.values()
    for client in clients.values():
        client.close()


# ---- INFO -----------------------------------------------------------------------------------------------------------------------------


def test_info_adds_up_all_processes(pair):
    _, one, other = pair
    one.config_resetstat()
    assert other.info("stats")["total_commands_processed"] <= 2, "RESETSTAT is for all"
    for client in (one, other):
        for i in range(50):
            client.set("k", i)
        for _ in range(3):
            with pytest.raises(redis.ResponseError):
                client.execute_command("NO", "SUCH") if client is one else client.execute_command("INCRBY", "k", "x")
        client.append("k", "y")
        with pytest.raises(redis.ResponseError):
            client.execute_command("INCR", "k")
        client.set("k", 1)
        with pytest.raises(redis.ResponseError):
            client.execute_command("GET")
    seen = [client.info("everything") for client in (one, other)]
    for info in seen:
        assert info["cmdstat_set"]["calls"] == 102 and info["cmdstat_set"]["failed_calls"] == 0
        assert info["cmdstat_incr"] == {**info["cmdstat_incr"], "calls": 2, "failed_calls": 2, "rejected_calls": 0}
        assert info["cmdstat_incrby"]["failed_calls"] == 3
        assert info["cmdstat_get"] == {"calls": 0, "usec": 0, "usec_per_call": 0.0, "rejected_calls": 2, "failed_calls": 0}
        assert info["cmdstat_set"]["usec"] > 0
        assert info["total_error_replies"] == info["errorstat_ERR"]["count"] == 3 + 3 + 2 + 2
        assert 102 < info["total_commands_processed"] < 200
        assert info["total_net_input_bytes"] > 100 * len("SET k 1") and info["total_net_output_bytes"] > 100 * len("+OK\r\n")
        assert info["connected_clients"] >= 2
        assert info["instantaneous_ops_per_sec"] >= 0
    assert seen[0]["worker"] != seen[1]["worker"]
    assert sum(c["calls"] for name, c in seen[1].items() if name.startswith("cmdstat_")) == seen[1]["total_commands_processed"]


def test_info_within_a_transaction_is_of_its_own_process(pair):
    service, one, other = pair
    victim = next(client for pid, client in one_of_each(service).items() if pid == pid_of(other))
    one.config_resetstat()
    other.set("k", 1)
    for words in (["MULTI"], ["SET", "k", 2], ["INFO", "everything"], ["CLIENT", "LIST"], ["CLIENT", "KILL", "ID", victim.client_id()]):
        one.execute_command(*words)
    _, info, clients, _ = one.execute_command("EXEC")
    assert b"\r\nworkers_counted:1\r\n" in info and b"\r\ncmdstat_set:calls=1," in info
    assert len(clients.splitlines()) < len(one.client_list())
    with pytest.raises(redis.ConnectionError):
        until(lambda: not victim.ping())  # that is done elsewhere, too, though nobody waits for it
    assert one.info("everything")["cmdstat_set"]["calls"] == 2


def test_clients_that_want_no_reply_get_none_of_a_command_that_has_to_ask(pair):
    service, _, _ = pair
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(LIMIT)
        sock.connect(service.path)
        sock.sendall(b"CLIENT REPLY SKIP\r\nINFO\r\nPING\r\nCLIENT REPLY OFF\r\nINFO\r\nCLIENT KILL 1.1.1.1:1\r\nPING\r\nCLIENT REPLY ON\r\nPING\r\n")
        data = b""
        while data.count(b"\r\n") < 3:
            data += sock.recv(65536)
        assert data == b"+PONG\r\n+OK\r\n+PONG\r\n"


def test_replies_keep_their_order_around_a_command_that_has_to_ask(pair):
    _, one, _ = pair
    with one.pipeline(transaction=False) as pipe:
        for i in range(20):
            pipe.set("k", i).execute_command("INFO", "cpu").get("k").execute_command("SLOWLOG", "LEN")
        replies = pipe.execute()
    assert [replies[i] for i in range(2, 80, 4)] == [b"%d" % i for i in range(20)]


def test_a_stopped_process_is_not_waited_for_long_and_holds_up_nobody(serve):
    service = serve("--workers", "2")
    clients = one_of_each(service)
    stopped, client = next(iter(clients)), list(clients.values())[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        asker, beside = threading.Thread(target=client.info), service.client()  # of the one that accepts: the same
        began = time.monotonic()
        asker.start()
        while asker.is_alive():
            assert beside.set("k", 1)
        assert ANSWER_LIMIT * 0.9 < time.monotonic() - began < LIMIT / 2
        assert client.info()["workers_counted"] == 1
    finally:
        os.kill(stopped, signal.SIGCONT)
    until(lambda: client.info()["workers_counted"] == 2)


def test_everything_goes_on_when_a_process_dies(serve):
    service = serve("--workers", "2")
    clients = one_of_each(service)
    victim, client = next(iter(clients)), list(clients.values())[1]
    stop, wrong = threading.Event(), []

    def ask():
        while not stop.is_set():
            if client.info()["workers_counted"] not in (1, 2) or not client.client_list():
                wrong.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        os.kill(victim, signal.SIGKILL)
        until(lambda: len([pid for pid in service.workers() if pid != victim]) == 2)
        assert len(one_of_each(service)) == 2
    finally:
        stop.set()
        thread.join(LIMIT)
    assert not wrong


def test_info_says_of_snapshots_and_log_what_the_segment_knows(serve, name, tmp_path):
    service = serve("--data-dir", str(tmp_path / "data"), "--log", "everysec", "--snapshot-every", "1000")
    client = service.client()
    until(lambda: client.info("persistence")["rdb_last_save_time"] > 0 and not client.info("persistence")["rdb_bgsave_in_progress"])
    with client.pipeline(transaction=False) as pipe:
        for i in range(20000):
            pipe.set(f"k{i}", b"x" * 500)
        pipe.execute()
    before = client.info("persistence")
    assert before["aof_enabled"] == 1 and before["log_policy"] == "everysec" and before["rdb_current_bgsave_time_sec"] == -1
    client.bgsave()
    seen = until(lambda: (info := client.info("persistence"))["rdb_bgsave_in_progress"] and info)
    assert seen["aof_rewrite_in_progress"] == 1 and seen["rdb_current_bgsave_time_sec"] >= 0
    until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"])
    until(lambda: client.info("persistence")["aof_buffer_length"] == 0)
    with shmcache.attach(name) as cache:
        os.kill(cache.supervisor()["pid"], signal.SIGSTOP)
        try:
            client.set("k", b"x" * 1000)
            assert client.info("persistence")["aof_buffer_length"] > 1000
        finally:
            os.kill(cache.supervisor()["pid"], signal.SIGCONT)


def test_a_snapshot_whose_writer_died_is_not_in_progress(cache):
    cache.views(writable=True).header["snapshot_begun_ms"] = int(time.time() * 1000)
    assert cache.durability()["snapshot_writing_s"] is None, "there is no supervisor"
    supervisor = shmcache.supervise(cache.name)
    try:
        until(lambda: cache.durability()["snapshot_writing_s"] is None)
    finally:
        supervisor.terminate()
        supervisor.wait()


def test_info_parses_as_that_of_redis(serve, tmp_path):
    """What a panel or exporter reads with redis-py has the same type as redis-server's."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    path, seen = str(tmp_path / "redis"), []
    options = ["--port", "0", "--unixsocket", path, "--dir", str(tmp_path), "--save", ""]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        until(lambda: os.path.exists(path))
        for client in (redis.Redis(unix_socket_path=path), serve().client()):
            client.set("k", 1)
            with pytest.raises(redis.ResponseError):
                client.execute_command("NO", "SUCH")
            seen.append(client.info("everything"))
            assert all(isinstance(client.info(section), dict) for section in ("server", "clients", "commandstats", "errorstats", "keyspace"))
    finally:
        process.terminate()
        process.wait()
    theirs, ours = seen
    assert "__raw__" not in ours
    kinds = {name: (type(ours[name]), type(theirs[name])) for name in set(ours) & set(theirs)}
    assert {name: pair for name, pair in kinds.items() if pair[0] is not pair[1]} == {}
    assert len(kinds) >= 65
    assert ours["db0"].keys() == theirs["db0"].keys() and ours["cmdstat_set"].keys() == theirs["cmdstat_set"].keys()
    assert ours["errorstat_ERR"] == {"count": 1} and theirs["errorstat_ERR"].keys() == {"count"}


# ---- CLIENT, MONITOR, SLOWLOG -----------------------------------------------------------------------------------------------------------


def test_client_list_is_of_all_processes(pair):
    _, one, other = pair
    one.client_setname("one")
    other.client_setname("other")
    for client in (one, other):
        found = client.client_list()
        assert {"one", "other"} <= {c["name"] for c in found}
        assert [int(c["id"]) for c in found] == sorted(int(c["id"]) for c in found)
        assert [c["name"] for c in found if c["cmd"] == "client|list"] == ["one" if client is one else "other"]
    ids = [one.client_id(), other.client_id()]
    assert sorted(int(c["id"]) for c in one.client_list(client_id=[str(i) for i in ids])) == sorted(ids)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_asked_of_all_processes_is_logged_as_slow_too(serve, workers):
    """As Redis does: SLOWLOG RESET is the first entry of the new log."""
    service = serve("--workers", workers)
    client = next(iter(one_of_each(service).values()))
    client.config_set("slowlog-log-slower-than", 0)
    client.get("k")
    client.slowlog_reset()
    assert [entry["command"] for entry in client.slowlog_get()] == [b"SLOWLOG RESET"]
    client.client_list()
    client.get("k")
    assert [entry["command"] for entry in client.slowlog_get()] == [b"GET k", b"CLIENT LIST", b"SLOWLOG GET", b"SLOWLOG RESET"]


def test_client_kill_finds_its_client_in_any_process(pair):
    service, one, other = pair
    victim = redis.Redis(port=service.port, single_connection_client=True, retry=None)
    for how in (lambda c: one.client_kill_filter(_id=c["id"]), lambda c: other.client_kill_filter(_id=c["id"]), lambda c: one.client_kill(c["addr"])):
        victim.ping()
        victim.client_setname("victim")
        (seen,) = [c for c in one.client_list() if c["name"] == "victim"]
        assert how(seen) in (1, True)
        until(lambda: not [c for c in other.client_list() if c["name"] == "victim"])
        with pytest.raises(redis.ConnectionError):
            victim.ping()
    with pytest.raises(redis.ResponseError, match="No such client"):
        one.client_kill("127.0.0.1:1")
    assert one.client_kill_filter(_id=12345678) == 0
    n = len(one.client_list())
    assert other.client_kill_filter(_type="normal") == n - 1
    with pytest.raises(redis.ConnectionError):
        one.ping()
    assert other.ping()


def test_a_client_may_kill_itself_along_with_others_elsewhere(pair):
    service, one, other = pair
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(LIMIT)
        sock.connect(service.path)
        sock.sendall(b"CLIENT KILL TYPE normal SKIPME no\r\nPING\r\n")
        data = b""
        while part := sock.recv(1000):
            data += part
    assert re.fullmatch(rb":\d+\r\n", data) and int(data[1:]) >= 3
    for client in (one, other):
        with pytest.raises(redis.ConnectionError):
            client.ping()


def test_monitor_sees_commands_of_all_processes(pair):
    _, one, other = pair
    with one.monitor() as monitor, other.monitor() as second:
        for client in (one, other):
            client.client_list()  # asks all: who has answered has been told of the monitors before
        for client, word in ((one, "one"), (other, "other")):
            client.set("k", word)
        for each in (monitor, second):
            missing = {"SET k one", "SET k other"}
            while missing:
                missing.discard(each.next_command()["command"])


def test_monitors_that_have_gone_cost_nothing_any_more(pair):
    service, one, _ = pair
    before = [c for c in one.client_list() if "O" in c["flags"]]
    with one.monitor():
        until(lambda: [c for c in service.client().client_list() if "O" in c["flags"]])
    until(lambda: [c for c in service.client().client_list() if "O" in c["flags"]] == before)


def test_who_starts_again_is_told_of_monitors_settings_and_pauses(serve):
    service = serve("--workers", "2")
    clients = one_of_each(service)
    victim, client = next(iter(clients)), list(clients.values())[1]
    os.kill(victim, signal.SIGSTOP)  # it accepts no connection
    with service.client().monitor() as monitor:
        client.config_set("requirepass", "secret")
        client.execute_command("AUTH", "secret")
        client.client_pause(LIMIT * 1000, all=False)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len([pid for pid in service.workers() if pid != victim]) == 2)
        (new,) = [pid for pid in service.workers() if pid not in clients]
        fresh = {}

        def reached():
            with contextlib.suppress(redis.ConnectionError):
                each = service.client(single_connection_client=True, retry=None, password="secret", protocol=2)  # AUTH: an error if it has none
                fresh[pid_of(each)] = each
            return new in fresh

        until(reached)
        fresh[new].get("seen")
        while monitor.next_command()["command"] != "GET seen":
            pass
        written = threading.Event()
        writer = threading.Thread(target=lambda: (fresh[new].set("k", "v"), written.set()))
        writer.start()
        assert not written.wait(0.5)
        service.client(password="secret").client_unpause()
        assert written.wait(LIMIT)
        writer.join()


def test_pause_and_unpause_are_for_all_processes(pair):
    _, one, other = pair
    assert one.client_pause(LIMIT * 1000, all=False)
    written = threading.Event()
    writer = threading.Thread(target=lambda: (other.set("k", "v"), written.set()))
    writer.start()
    assert not written.wait(0.5)
    assert one.get("k") is None
    assert one.client_unpause()
    assert written.wait(LIMIT)
    writer.join()
    assert one.get("k") == b"v"


def test_slowlog_is_of_all_processes(pair):
    _, one, other = pair
    one.config_set("slowlog-log-slower-than", 0)
    one.slowlog_reset()
    one.set("k", "one")
    other.set("k", "other")
    for client in (one, other):
        found = client.slowlog_get(100)
        assert {b"SET k one", b"SET k other"} <= {entry["command"] for entry in found}
        assert len({entry["id"] for entry in found}) == len(found)
        assert client.slowlog_len() >= 2
        assert len(client.slowlog_get(1)) == 1
    one.config_set("slowlog-log-slower-than", -1)
    other.slowlog_reset()
    assert one.slowlog_len() == 0 == other.slowlog_len()


def test_a_command_that_threads_have_run_is_in_the_slow_log_and_counted_once(serve):
    client = serve("--enable-debug-command").client()
    client.config_resetstat()
    client.execute_command("DEBUG", "SLEEP", "0.1")
    (entry,) = client.slowlog_get()
    assert entry["command"] == b"DEBUG SLEEP 0.1" and entry["duration"] >= 100_000
    stat = client.info("commandstats")["cmdstat_debug"]
    assert stat["calls"] == 1 and stat["usec"] >= 100_000


# ---- metrics ----------------------------------------------------------------------------------------------------------------------------


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        return parsed(response.read().decode())


def parsed(text):
    """{(name, labels without the segment's): value}"""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge"), family.name
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "segment"}
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def total(metrics, name, **labels):
    return sum(v for (n, found), v in metrics.items() if n == "shmcache_" + name and labels.items() <= dict(found).items())


def test_metrics_are_what_info_says(serve, name, tmp_path):
    port = free_port()
    service = serve("--workers", "2", "--metrics-port", str(port), "--data-dir", str(tmp_path / "data"), "--log", "everysec")
    clients = one_of_each(service)
    for client in clients.values():
        for i in range(100):  # no pipeline: it would have a connection of its own, to either process
            client.set(f"k{i}", "v"), client.get(f"k{i}"), client.get("absent")
        with pytest.raises(redis.ResponseError):
            client.execute_command("INCR", "k1")
    client = next(iter(clients.values()))
    metrics, info = scrape(port), client.info("everything")
    assert [metrics["shmcache_worker_up", (("worker", w),)] for w in "01"] == [1, 1]
    assert total(metrics, "connections") == info["connected_clients"]
    assert total(metrics, "connections_accepted_total") == info["total_connections_received"]
    assert total(metrics, "connections_rejected_total") == info["rejected_connections"] == 0
    assert total(metrics, "commands_total") == info["total_commands_processed"]
    for command in ("set", "get", "incr", "client"):
        stat = info.get(f"cmdstat_{command}", {"calls": 0, "failed_calls": 0, "usec": 0})
        assert total(metrics, "commands_total", command=command) == stat["calls"]
        assert total(metrics, "commands_failed_total", command=command) == stat["failed_calls"]
        assert abs(total(metrics, "command_seconds_total", command=command) * 1e6 - stat["usec"]) <= 1
    assert all(total(metrics, "commands_total", command="set", worker=w) == 100 for w in "01")
    assert total(metrics, "error_replies_total", error="ERR") == info["total_error_replies"] == 2
    assert 0 < total(metrics, "net_input_bytes_total") <= info["total_net_input_bytes"]
    assert 0 < total(metrics, "net_output_bytes_total") <= info["total_net_output_bytes"]
    assert total(metrics, "hits_total") == info["keyspace_hits"] and total(metrics, "misses_total") == info["keyspace_misses"]
    assert total(metrics, "items") == info["db0"]["keys"] == 100
    assert total(metrics, "sets_total") >= 200 and total(metrics, "size_bytes") == info["maxmemory"]
    assert total(metrics, "class_live_bytes") > 0 and total(metrics, "class_pages") > 0
    assert total(metrics, "supervisor_up") == 1 and 0 <= total(metrics, "supervisor_heartbeat_age_seconds") < LIMIT
    assert total(metrics, "snapshot_failed") == total(metrics, "log_failed") == 0
    assert {n for n, _ in metrics} >= {
        "shmcache_" + n for n in ("snapshot_age_seconds", "log_waiting_bytes", "repairs_total", "event_loop_lag_seconds", "pool_commands", "replies_waiting")
    }
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=LIMIT)
    code = f"import sys; from shmcache.cli import admin; sys.exit(admin(['stats', {name!r}, '--format', 'prometheus', '--interval', '0.01']))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert {n for n, _ in parsed(printed.stdout)} <= {n for n, _ in metrics}, "one way to name them"


def test_metrics_survive_the_death_of_any_process(serve, name):
    port = free_port()
    service = serve("--workers", "2", "--metrics-port", str(port))
    clients = one_of_each(service)
    victim, other = list(clients)
    worker = str(clients[victim].info("server")["worker"])
    os.kill(victim, signal.SIGSTOP)
    metrics = scrape(port)
    assert metrics["shmcache_worker_up", (("worker", worker),)] == 0 and total(metrics, "worker_up") == 1
    os.kill(victim, signal.SIGKILL)
    until(lambda: total(scrape(port), "worker_up") == 2)
    with shmcache.attach(name) as cache:
        os.kill(cache.supervisor()["pid"], signal.SIGKILL)
    assert total(scrape(port), "size_bytes") > 0
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    (metrics_pid,) = [int(pid) for pid in children if b"sidecar.metrics" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(metrics_pid, signal.SIGKILL)
    until(lambda: total(scrape(port), "worker_up") == 2)
    assert clients[other].ping(), "its connections have seen nothing of it"


def test_metrics_need_their_extra(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['prometheus_client'] = None\n")
    argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "8M", "--port", str(free_port()), "--metrics-port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment)
    assert out.returncode == 2
    assert 'pip install "shmcache[metrics]"' in out.stderr
    with pytest.raises(shmcache.SegmentNotFound):
        shmcache.attach(name)


# ---- serving() --------------------------------------------------------------------------------------------------------------------------


def refused(port):
    try:
        redis.Redis(port=port, retry=None).ping()
    except redis.ConnectionError:
        return True
    return False


def test_a_program_serves_a_segment_of_its_own(name):
    with serving(name, "8M") as server, shmcache.attach(name) as cache:
        client = redis.Redis(port=server.port)
        assert client.set("k", "v") and cache["k"] == b"v"
        cache.set("n", 17)
        assert client.incr("n") == 18
        assert client.info("server")["process_id"] == os.getpid()
        assert server.unix is None
    assert refused(server.port)
    with shmcache.attach(name) as cache:
        assert cache["k"] == b"v", "the segment stays"
        with serving(name) as server:
            assert redis.Redis(port=server.port).get("k") == b"v"


def test_serving_on_a_unix_socket_alone(name, tmp_path):
    path = str(tmp_path / "socket")
    with serving(name, "8M", unix=path, password="secret") as server:
        assert (server.unix, server.port) == (path, 0)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(unix_socket_path=path).ping()
        assert redis.Redis(unix_socket_path=path, password="secret").ping()
        with pytest.raises(OSError, match="somebody listens"), serving(name, unix=path):
            pass
        assert redis.Redis(unix_socket_path=path, password="secret").ping(), "who was there is not disturbed"
    assert not os.path.exists(path)


def test_serving_ends_its_threads_whatever_ends_it(name):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), serving(name, "8M"):
        raise ZeroDivisionError
    with serving(name) as server:
        with pytest.raises(redis.ConnectionError):
            redis.Redis(port=server.port, retry=None).execute_command("SHUTDOWN", "NOSAVE")
        until(lambda: refused(server.port))
        with pytest.raises(shmcache.SegmentNotFound), serving(name + "-absent"):
            pass
    assert threading.active_count() == before


def test_the_readmes_example_of_serving(name):
    """As it stands there, with a name and size of its own."""
    readme = (TOOLS.parent / "README.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "serving(" in code]
    assert example.count('"web", size="64M"') == 1
    code = textwrap.dedent(example).replace('"web", size="64M"', f'{name!r}, size="8M"')
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)


# ---- systemd ----------------------------------------------------------------------------------------------------------------------------


def test_systemd_takes_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (TOOLS / "shmcache@.service").read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.M)[1]
    (tmp_path / "shmcache@.service").write_text(text.replace(program, shutil.which("true")))
    out = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "shmcache@web.service")], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert (out.returncode, out.stderr) == (0, "")


def test_the_units_command_is_one_that_serve_takes():
    from shmcache import cli

    text = (TOOLS / "shmcache@.service").read_text().replace("%i", "web")
    options = re.search(r'^Environment="OPTIONS=(.*)"$', text, re.M)[1].split()
    words = re.search(r"^ExecStart=\S+ (.*)$", text, re.M)[1].split()
    args = cli.parser().parse_args([w for word in words for w in (options if word == "$OPTIONS" else [word])])
    assert args.run is cli.do_serve and args.name == "web"
    assert re.search(r"^Type=notify$", text, re.M) and re.search(r"^RemoveIPC=no$", text, re.M)
    assert not re.search(r"^(DynamicUser|PrivateIPC)=yes$", text, re.M)
    runtime = re.search(r"^RuntimeDirectory=(\S+)$", text, re.M)[1]
    state = re.search(r"^StateDirectory=(\S+)$", text, re.M)[1]
    assert os.path.dirname(args.unix) == f"/run/{runtime}" and args.data_dir == f"/var/lib/{state}"
