#!/usr/bin/env bash
# Makes or refreshes a virtual environment with nxdt-align in it, for the Makefile.
#
#   scripts/make_venv.sh FOLDER
#
# PYTHON    interpreter to make it with (default: the first one of range that works)
# TORCH     requirements installed before all else (default: torch==2.13.0)
# PIP_ARGS  further arguments of every "pip install"
set -euo pipefail

venv=${1:?usage: make_venv.sh FOLDER}
repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# Word splitting is what a user who gives several arguments expects.
read -r -a pip_args <<<"${PIP_ARGS:-}"
read -r -a torch <<<"${TORCH:-torch==2.13.0}"

# True for an interpreter that runs (a pyenv shim may be there and fail), is in range, and has venv.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.10 python3; do
    if usable "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    # A choice of the user's is not replaced by another.
    [[ $candidate != "${PYTHON:-}" ]] || break
  done
  echo "error: ${PYTHON:-python3} is not a working Python 3.10 to 3.13 with venv and ensurepip." >&2
  echo "Install one (Debian and Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python3.11" >&2
  return 1
}

if ! usable "$venv/bin/python"; then
  python=$(find_python)
  echo "Making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
echo "Installing into $venv (a minute or more, about 2 GB with a CPU build of torch)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# torch on its own first, so that the choice of build is not the resolver's.
"${pip[@]}" install --quiet ${pip_args[@]+"${pip_args[@]}"} "${torch[@]}"
"${pip[@]}" install --quiet ${pip_args[@]+"${pip_args[@]}"} --editable "${repo}[test]"
"${pip[@]}" check
