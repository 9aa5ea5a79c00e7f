#!/usr/bin/env bash
# Step of the images: the wheel of foveate, from the source in /src into /wheels. It must hold the CPU kernels: setup.py
# goes on without them where nothing can be compiled, and an image would be slow without a word.
set -euo pipefail
python3 -m venv /build
/build/bin/python -m pip install --no-cache-dir 'setuptools>=77'
/build/bin/python -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels /src
/build/bin/python - <<'PY'
import pathlib, sys, zipfile
(wheel,) = pathlib.Path("/wheels").glob("foveate-*.whl")
if not any(name.endswith("/libfoveate_kernels.so.1") for name in zipfile.ZipFile(wheel).namelist()):
    import platform
    if platform.machine() in {"x86_64", "AMD64"}:
        sys.exit(f"{wheel} holds no kernels")
print(f"image: {wheel.name}, {wheel.stat().st_size} bytes")
PY
