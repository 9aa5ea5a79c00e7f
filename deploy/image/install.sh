#!/usr/bin/env bash
# Step of the images: the environment /opt/foveate with torch (for "cpu" or "cuda"), the wheel and its dependencies.
# Called twice, so that a change of foveate's own code does not fetch torch again:
#
#   install.sh torch cpu|cuda
#   install.sh foveate cpu|cuda
set -euo pipefail
readonly VENV=/opt/foveate
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1

say() { printf 'image: %s\n' "$*" >&2; }
die() {
    printf 'image: error: %s\n' "$@" >&2
    exit 1
}
source "$(dirname "${BASH_SOURCE[0]}")/../torch.sh"

case "$1 $2" in
"torch cpu" | "torch cuda")
    python3 -m venv "$VENV"
    "install_torch_$2"
    torch_version >/dev/null || die "torch was installed but does not import"
    ;;
"foveate cpu" | "foveate cuda")
    extras=otel
    [[ $2 == cpu ]] || extras=gpu,otel
    wheel=$(echo /wheels/foveate-*.whl)
    "$VENV/bin/python" -m pip install "torch==$(torch_version)" "$wheel[$extras]"
    if [[ $2 == cuda ]]; then # flashinfer compiles its kernels when they are first asked for
        "$VENV/bin/python" -m pip install 'cuda-toolkit[nvcc,cccl]==13.*'
        cuda=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
        [[ -x $cuda/bin/nvcc ]] || die "there is no nvcc in $cuda/bin"
        # Where it links, and the name that it links to; the wheels of CUDA have neither.
        ln -sfn lib "$cuda/lib64"
        ln -sfn libcudart.so.13 "$cuda/lib/libcudart.so"
    fi
    if [[ $(uname -m) == x86_64 ]]; then
        "$VENV/bin/python" -c 'import sys; from foveate.sparse_attn.ops import native; sys.exit(not native.library())' ||
            die "the CPU kernels were built but do not load"
    fi
    # Without bytecode of its own a container with a read-only root would compile it at every start.
    "$VENV/bin/python" -m compileall -q "$VENV/lib" >/dev/null || true # a few files are for other Pythons
    ;;
*) die "usage: install.sh torch|foveate cpu|cuda" ;;
esac
