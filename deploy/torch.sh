# Sourced by setup.sh and image/install.sh: puts torch into the environment $VENV, without CUDA unless it is of use.
# The caller defines say and die.

readonly TORCH_CPU=2.13.0 # the oldest release that pyproject.toml allows: what we claim is what we test
readonly TORCH_CUDA=2.15.0 # the CUDA build pins its own triton; this is the release that pins the one we test (3.9)

torch_version() { # prints the version in the environment, fails where there is none that will do
    "$VENV/bin/python" - <<'PY' 2>/dev/null
import torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
print(torch.__version__)
PY
}

# Would plain pip take a torch without CUDA? Asks for the metadata of the wheel it would choose.
pip_torch_is_cpu() {
    "$VENV/bin/python" -m pip install --dry-run --no-deps --quiet --report - "torch==$TORCH_CPU" 2>/dev/null |
        "$VENV/bin/python" -c '
import json, sys
chosen = json.load(sys.stdin)["install"][0]["metadata"]
cuda = [need for need in chosen.get("requires_dist", []) if need.startswith(("nvidia-", "cuda-"))]
sys.exit(not ("+cpu" in chosen["version"] or sys.platform == "darwin" or not cuda))' 2>/dev/null
}

install_torch_cuda() {
    say "installing torch $TORCH_CUDA with CUDA"
    "$VENV/bin/python" -m pip install "torch==$TORCH_CUDA"
}

install_torch_cpu() {
    if pip_torch_is_cpu; then
        say "installing torch $TORCH_CPU for CPU"
        "$VENV/bin/python" -m pip install "torch==$TORCH_CPU"
    else
        say "installing torch $TORCH_CPU for CPU (with uv, which knows where the builds without CUDA are)"
        "$VENV/bin/python" -m pip install --quiet uv
        "$VENV/bin/uv" pip install --python "$VENV/bin/python" --torch-backend=cpu "torch==$TORCH_CPU" ||
            die "The CPU build of torch could not be fetched. Either put its wheel into a folder and run" \
                "    PIP_FIND_LINKS=/that/folder make ..." \
                "or accept the build with CUDA (several gigabytes), then run this again:" \
                "    $VENV/bin/pip install torch==$TORCH_CUDA"
    fi
}
