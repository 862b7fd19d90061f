# Sourced by the scripts of this folder from the repository's root: leaves $PYTHON, the interpreter of a virtual environment that
# has the package (editable, rebuilt when its sources changed) and the extras in $EXTRAS.
#   SHMCACHE_PYTHON  the base interpreter (python3)      SHMCACHE_VENV  where the environment is (.venv)
base=${SHMCACHE_PYTHON:-python3}
venv=${SHMCACHE_VENV:-$PWD/.venv}
extras=${EXTRAS:-test}
"$base" - <<'CHECK' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit("shmcache needs Python 3.11 or later; set SHMCACHE_PYTHON to one")
CHECK
if [ ! -x "$venv/bin/python" ]; then
    echo "setting up $venv ..." >&2
    "$base" -m venv "$venv" || exit 2
fi
PYTHON=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
wanted=$(cat pyproject.toml shmcache/core/*.pyx shmcache/core/*.pxd | sha256sum; echo "$extras $PWD ${CFLAGS:-}")
if [ "$(cat "$venv/shmcache.built" 2>/dev/null)" != "$wanted" ]; then
    echo "building ..." >&2
    log=$venv/shmcache.log
    # Translated first, by several processes; then setuptools, which would do both by one, finds the C and compiles in threads.
    printf '[build_ext]\nparallel = %s\n' "$(nproc)" >"$venv/parallel.cfg"
    "$PYTHON" -m pip install "setuptools>=77" "Cython>=3.1" >"$log" 2>&1 &&
        "$PYTHON" -m Cython.Build.Cythonize --quiet shmcache/core/*.pyx >>"$log" 2>&1 &&
        DIST_EXTRA_CONFIG=$venv/parallel.cfg "$PYTHON" -m pip install --no-build-isolation -e ".[$extras]" >>"$log" 2>&1 ||
        { tail -40 "$log" >&2; exit 2; }
    printf '%s\n' "$wanted" >"$venv/shmcache.built"
fi
