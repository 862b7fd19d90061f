"""Builds of the core that no user ever gets, each in a folder of its own under build/, together with a copy of the tests.

    python -m tests.special -DSHMCACHE_FAULT_POINTS        builds it, prints the folder
    python -m tests.special --sanitized pytest tests/unit  builds with sanitizers, runs a module there

A process started in that folder with it on PYTHONPATH runs the special build; the source tree and the environment are left alone.

    -DSHMCACHE_FAULT_POINTS      named places at which a test lets a process die, stop, dawdle or find a lock busy (crash/fault.pxd)
    -DSHMCACHE_NO_VERSION_CHECK  readers trust what they copied
    -DSHMCACHE_NO_TAKEOVER       nobody is ever taken for dead
    -DSHMCACHE_NO_GENERATIONS    a token is a row, whoever has it
    -fsanitize=address,undefined and the like
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULT = ROOT / "tests" / "crash" / "fault.pxd"
SPECIAL = ROOT / "build" / "special"
SOURCES = ("shmcache", "pyproject.toml", "setup.cfg", "README.md", "LICENSE")
CALLS = {"!": r'fault("\2")', "~": r'delay("\2")', r"\?": r'if busy("\2"): return -1'}  # what becomes of the comments (crash/fault.pxd); -1: BUSY
# -fno-sanitize=null: layout() takes the offsets of fields as addresses in a struct at 0
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


def points_of_build(kinds: str = "fault") -> set[str]:
    """The names of the fault points of the build that runs ("fault|delay": of those within reads, too); none in any but a build with
    -DSHMCACHE_FAULT_POINTS."""
    from shmcache.core import _core

    sources = Path(_core.__file__).parent.glob("*.p*x*")
    return {name for path in sources for name in re.findall(rf'^ *(?:{kinds})\("(.+)"\)$', path.read_text(), re.MULTILINE)}


def call_faults(core: Path) -> None:
    """Turn the comments that name points into calls."""
    shutil.copy(FAULT, core / FAULT.name)
    for path in core.glob("*.p*x*"):
        if path.name == FAULT.name:
            continue
        text, n = path.read_text(), 0
        for mark, call in CALLS.items():
            text, of_these = re.subn(rf"^( *)#{mark} (.+)$", rf"\1{call}", text, flags=re.MULTILINE)
            n += of_these
        if n:
            path.write_text(text.replace("\nfrom shmcache.core.", "\nfrom shmcache.core.fault cimport busy, delay, fault\nfrom shmcache.core.", 1))


def leave_out(project: Path, extension: str) -> None:
    """Of what is compiled. What takes something away from the core is shown by workers, not by the sidecar, whose half takes the longest."""
    change(project, rf'^ *\{{ name = "shmcache\.core\.{extension}".*\n', "", 1)


def change(path: Path, pattern: str, by: str, times: int) -> None:
    text, n = re.subn(pattern, by, path.read_text(), flags=re.MULTILINE)
    if n != times:
        raise RuntimeError(f"{path}: {n} times {pattern}, not {times}")
    path.write_text(text)


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Who comes first is told to make the folder, which is empty; others wait for that. What was left half made is made anew."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not (folder / "made").exists()
        if missing:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield missing
        (folder / "made").touch()


def run(argv: list[str], **env: str) -> None:
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv} failed with {env}:\n{done.stdout}\n{done.stderr}")


def digest(*parts: object) -> str:
    """Names what is made of the core's sources with these parts."""
    found = hashlib.sha256(repr((sys.version, parts)).encode())
    for path in sorted([*(ROOT / "shmcache/core").glob("*.p*x*"), ROOT / "pyproject.toml", FAULT, Path(__file__)]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def translated(faults: bool) -> Path:
    """The folder of the sources, with or without calls at the fault points, and the C that Cython makes of them: flags do not change it."""
    folder = SPECIAL / f"source-{digest(faults)}"
    with made_once(folder) as missing:
        if missing:
            for name in SOURCES:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
                else:
                    shutil.copy(ROOT / name, folder / name)
            core = folder / "shmcache" / "core"
            if faults:
                call_faults(core)
                # of the sidecar's half only what it calls of the others is looked at here, and -O3 takes twice as long
                change(folder / "pyproject.toml", r'(_resp".*)"-O3"', r'\1"-O1"', 1)
            run([sys.executable, "-m", "Cython.Build.Cythonize", "--quiet", *map(str, sorted(core.glob("*.pyx")))])
            change(folder / "pyproject.toml", r'"(shmcache/core/_\w+)\.pyx"', r'"\1.c"', 7)
            (folder / "parallel.cfg").write_text(f"[build_ext]\nparallel = {os.cpu_count() or 1}\n")
    return folder


def build(*flags: str) -> Path:
    """The folder of the build with these compiler flags; made anew when the core's sources changed. About half a minute."""
    folder = SPECIAL / digest(flags)
    with made_once(folder) as missing:
        if missing:
            source = folder / "source"
            shutil.copytree(translated("-DSHMCACHE_FAULT_POINTS" in flags), source)
            if any(flag.startswith("-DSHMCACHE_NO_") for flag in flags):
                leave_out(source / "pyproject.toml", "_resp")
                change(source / "pyproject.toml", '"-O3"', '"-O1"', 6)  # only to be seen to fail, by workers that die at given places
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)]
            run(pip, CFLAGS=" ".join(flags), DIST_EXTRA_CONFIG=str(source / "parallel.cfg"))
            shutil.rmtree(source)
        for top in ("shmcache", "tests"):  # what is not compiled as it is now: it is no part of the digest
            for path in (ROOT / top).rglob("*"):
                if path.suffix in (".py", ".pml", ".lua"):
                    refresh(path, folder / path.relative_to(ROOT))
    return folder


def refresh(path: Path, copy: Path) -> None:
    """Make copy what path is, in one step: another process may be importing it."""
    if copy.exists() and copy.read_bytes() == path.read_bytes():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    new = copy.with_name(copy.name + ".new")
    shutil.copy(path, new)
    os.replace(new, copy)


def command(folder: Path, *module_and_args: str) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) that run `python -m ...` on the build in this folder; start it with cwd=folder."""
    return [sys.executable, "-m", *module_and_args], {**os.environ, "PYTHONPATH": str(folder)}


def sanitized(*module_and_args: str, **asan_options: object) -> tuple[Path, list[str], dict[str, str]]:
    """(folder, argv, environment) that run `python -m ...` on a build with AddressSanitizer and UndefinedBehaviourSanitizer.

    Shared memory itself is not instrumented: what is seen is what leaves a mapping, and undefined arithmetic.
    """
    folder = build(*SANITIZERS)
    argv, env = command(folder, *module_and_args)
    compiler = os.environ.get("CC", "gcc")
    libraries = [subprocess.check_output([compiler, f"-print-file-name=lib{name}.so"], text=True).strip() for name in ("asan", "ubsan")]
    # leaks: the interpreter's own are many. handle_segv: faulthandler and tests have handlers of their own
    options = {"detect_leaks": 0, "handle_segv": 0, "allocator_may_return_null": 1, **asan_options}
    env |= {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return folder, argv, env


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sanitized"]:
        _folder, _argv, _env = sanitized(*sys.argv[2:])
        os.chdir(_folder)
        os.execve(_argv[0], _argv, _env)
    print(build(*sys.argv[1:]))
