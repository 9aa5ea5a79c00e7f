#!/usr/bin/env bash
# Makes .venv with everything that the demo, the tests and the benchmarks need. Run it as often as you like:
# when nothing changed it returns at once. It never pulls CUDA onto a machine without an NVIDIA GPU.
#
#   PYTHON=/path/to/python deploy/setup.sh     another interpreter (3.11 or newer)
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." # without links: so venv writes the path down that `intact` looks for

readonly VENV=.venv
readonly STAMP=$VENV/.foveate-setup
readonly FLASHINFER=0.7.2.post1 # where no GPU is: its kernels cannot run there, but our calls are checked against it

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    printf 'setup: error: %s\n' "$@" >&2
    exit 1
}
source deploy/torch.sh

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        [[ -z ${PYTHON:-} ]] || die "PYTHON=$PYTHON does not run, or is older than 3.11."
    done
    die "Python 3.11 or newer was not found. Install it (for example: apt-get install python3 python3-venv)," \
        "or name one: PYTHON=/path/to/python make ..."
}

check_tools() {
    local python=$1 compiler
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv or no pip. Install them: apt-get install python3-venv python3-pip"
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        if command -v "$compiler" >/dev/null; then return; fi
    done
    die "No C++ compiler was found. Install one: apt-get install g++"
}

# What the environment is made from; changing any of it makes the next run install again.
fingerprint() {
    "$1" - pyproject.toml setup.py deploy/setup.sh deploy/torch.sh sparse_attn/ops/native/*.{cpp,h} <<'PY'
import hashlib, os, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
parts.append(f"{os.getcwd()} {sys.version_info[:2]}".encode())
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

# Was the environment made in this folder, and has every installed distribution its list of files and every file of it?
# Not so where a set-up was cut off.
intact() {
    grep -qsF "$PWD/$VENV/" "$VENV/bin/pip" && "$VENV/bin/python" -c 'import pip' 2>/dev/null &&
        "$VENV/bin/python" - <<'PY'
import importlib.metadata, sys
for distribution in importlib.metadata.distributions():
    files = distribution.files
    if files is None or not all(file.locate().exists() for file in files if file.suffix != ".pyc"):
        sys.exit(f"setup: {distribution.name or distribution} is half installed")
PY
}

has_nvidia_gpu() { nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
    if torch_version >/dev/null; then return; fi
    if has_nvidia_gpu; then
        install_torch_cuda
    else
        install_torch_cpu
    fi
    torch_version >/dev/null || die "torch was installed into $VENV but does not import: $VENV/bin/python -c 'import torch'"
}

# Optional: without it the Triton kernels serve a GPU, and its tests are skipped.
install_flashinfer() {
    local pip=("$VENV/bin/python" -m pip install --constraint "$VENV/constraints.txt")
    if has_nvidia_gpu; then
        "${pip[@]}" --editable '.[gpu]'
    else # --no-deps, because its dependencies pull gigabytes of CUDA; named are the few that its import needs
        "${pip[@]}" apache-tvm-ffi einops tabulate nvidia-ml-py requests click tqdm ninja &&
            "${pip[@]}" --no-deps "flashinfer-python==$FLASHINFER"
    fi
}

main() {
    local python stamp
    if [[ -f $STAMP ]] && [[ "$(cat "$STAMP")" == "$(fingerprint "$VENV/bin/python" 2>/dev/null)" ]]; then return; fi

    python=$(find_python)
    check_tools "$python"
    if [[ -e $VENV ]] && ! intact; then
        say "$VENV is broken; making it again"
        rm -rf "$VENV"
    fi
    [[ -e $VENV ]] || { say "making $VENV with $("$python" --version)"; "$python" -m venv "$VENV"; }

    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch
    printf 'torch==%s\n' "$(torch_version)" >"$VENV/constraints.txt"
    say "installing foveate and what it needs"
    "$VENV/bin/python" -m pip install --constraint "$VENV/constraints.txt" --editable '.[dev]'
    say "installing flashinfer"
    install_flashinfer ||
        say "warning: flashinfer could not be installed: its tests will be SKIPPED. Again: rm $STAMP && make setup"
    stamp=$(fingerprint "$VENV/bin/python")
    printf '%s\n' "$stamp" >"$STAMP"
    say "done"
}

main
