# Sourced by the scripts beside it: the project's own environment in .venv. Must run in bash 3.2 (macOS).
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '+ %s\n' "$*"; }

run() { say "$@"; "$@"; }

die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

make_venv() {
  local python=${PYTHON:-python3}
  if [ ! -x "$venv/bin/python" ]; then
    command -v "$python" >/dev/null || die "$python: not found; install Python 3.10 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      die "$python: is older than Python 3.10; set PYTHON to a newer one"
    run "$python" -m venv "$venv" || { rm -rf "$venv"; die "$python: cannot make an environment; install its venv module"; }
  fi
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || die "$venv: has no pip; remove the folder and run this again"
}

# install_edgekv [EXTRA...]: the package into .venv, or, where tools/dev has made .venv, only a rebuild of the checkout
install_edgekv() {
  make_venv
  if [ -e "$venv/edgekv-dev" ]; then
    run "$root/tools/dev"
    if [ $# -gt 0 ]; then run_pip_requirements "$@"; fi
  else
    if [ ! -d "$root/build" ]; then echo "the first build compiles llama.cpp: about 10 minutes on two cores"; fi
    local extras
    extras=$(IFS=,; echo "$*")
    run "$venv/bin/python" -m pip install -q "$root${extras:+[$extras]}"
  fi
}

# the dependencies of pyproject.toml, and of extras, without the package
run_pip_requirements() {
  local list=$venv/requirements.txt
  "$venv/bin/python" - "$root/pyproject.toml" "$@" >"$list" <<'PYTHON'
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(sum((project["optional-dependencies"][extra] for extra in sys.argv[2:]), project["dependencies"])))
PYTHON
  run "$venv/bin/python" -m pip install -q -r "$list"
}
