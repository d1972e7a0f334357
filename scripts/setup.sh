# Sourced by the other scripts. `setup` makes .venv in the clone and installs the project into it; `setup test` adds what
# the tests need. It does nothing when that is done already, and starts over cleanly after an interruption: the stamp
# that says "done" is written last.
#
# Python: $PYTHON if set, otherwise the first of python3, python3.13, python3.12, python3.11 that is new enough.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer among: ${PYTHON:-python3 python3.13 python3.12 python3.11};" \
    "install one, or name it: PYTHON=/path/to/python bash $0" >&2
  return 2
}

# What an installation depends on: the two files, the folder (an editable install points to it) and the interpreter.
setup_key() {
  .venv/bin/python -c '
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(files + repr((str(pathlib.Path.cwd()), sys.version)).encode()).hexdigest())'
}

setup() {
  local extra=${1:-} stamp key python pip
  stamp=.venv/lm_zoo-installed${extra:+-$extra}

  if key=$(setup_key 2>/dev/null); then
    # An installation with the test extra serves the other scripts as well.
    for done in "$stamp" .venv/lm_zoo-installed-test; do
      [ "$(cat "$done" 2>/dev/null)" = "$key" ] && return
    done
  fi

  echo "Setting up .venv (once; it takes a few minutes) ..." >&2
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || return
    "$python" -m venv --clear .venv || {
      echo "error: $python cannot make a virtual environment here; see the lines above" >&2
      return 2
    }
  fi
  rm -f .venv/lm_zoo-installed*
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off \
    -c constraints.txt -e ".${extra:+[$extra]}" || {
    echo "error: installing the project failed; see the lines above" >&2
    return 2
  }
  key=$(setup_key) || return
  printf '%s\n' "$key" >"$stamp.part" && mv "$stamp.part" "$stamp"
}
