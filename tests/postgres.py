"""A PostgreSQL server for tests, and PgBouncer before it: Debian's, in a folder of its own, on Unix sockets there, stopped and removed after use."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.redis.servers import Failed, Missing, need

USER = "postgres"
SETTINGS = ["listen_addresses=", "fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=50"]


def program(name: str) -> str:
    """The path of one of PostgreSQL's own programs, which Debian keeps out of PATH. Raises: Missing."""
    found = shutil.which(name)
    if found is None:
        need("pg_ctlcluster", "postgresql")
        paths = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
        if not paths:
            raise Missing(f"{name} is missing: the package postgresql of Debian has it")
        found = str(paths[-1])
    return found


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A server with an empty database; its url. It refuses to run as root: then it runs as the user that its package has made."""
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    user = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []

    def run(*argv: str) -> None:
        # Not captured: what pg_ctl starts would keep a pipe open
        with (folder / "output").open("ab") as out:
            done = subprocess.run([*user, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, timeout=120, check=False)
        if done.returncode:
            raise Failed(f"{argv[0]} ended with {done.returncode}:\n{(folder / 'output').read_text(errors='replace')[-2000:]}")

    folder = Path(tempfile.mkdtemp(prefix="shmcache-test-"))
    data = folder / "data"
    try:
        if user:
            shutil.chown(folder, USER)
        run(initdb, "-D", str(data), "-U", USER, "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = " ".join(f"-c {setting}" for setting in [*SETTINGS, f"unix_socket_directories={folder}"])
        run(pg_ctl, "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://{USER}@/postgres?host={folder}"
        finally:
            run(pg_ctl, "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


BOUNCER = """
[databases]
postgres = host={folder} user={user}
[pgbouncer]
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
pidfile = {folder}/bouncer.pid
logfile = {folder}/bouncer.log
"""


@contextlib.contextmanager
def bouncer(url: str) -> Iterator[str]:
    """PgBouncer in transaction mode, with four connections to the server of that url; the url of the same database through it."""
    path = need("pgbouncer", "pgbouncer")
    folder = Path(url.partition("host=")[2])
    (folder / "bouncer.ini").write_text(BOUNCER.format(folder=folder, user=USER))
    user = USER if os.geteuid() == 0 else None
    subprocess.run([path, "-q", "-d", str(folder / "bouncer.ini")], stdin=subprocess.DEVNULL, user=user, timeout=60, check=True)
    try:
        deadline = time.monotonic() + 30
        while not (folder / ".s.PGSQL.6432").exists() or not (folder / "bouncer.pid").exists():
            if time.monotonic() > deadline:
                raise Failed(f"pgbouncer did not come up:\n{(folder / 'bouncer.log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)  # between two looks
        yield f"{url}&port=6432&application_name=pooled"
    finally:
        pid = int((folder / "bouncer.pid").read_text())
        ended = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGTERM)
            select.select([ended], [], [], 30)
        finally:
            os.close(ended)
