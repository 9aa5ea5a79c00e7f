"""What the keys and values of a page depend on, beside tokens, attention policy and salt."""

from __future__ import annotations

import hashlib
import json

from foveate import __version__
from foveate.kv_cache.disk_format import FORMAT_VERSION
from foveate.kv_cache.geometry import CacheGeometry
from foveate.patches.fingerprint import fingerprint, weights_digest

from .loader import LoadedModel
from .options import EngineOptions

# Of a config: where it came from, and what wrote it.
_IGNORED = ("_name_or_path", "transformers_version")
# Raised where a scheme keeps other statistics of a page than before, so that pages without them are not found.
_STATISTICS = 2


def identity_of(loaded: LoadedModel, geometry: CacheGeometry, options: EngineOptions) -> bytes:
    """SHA-256 over the whole config, every weight, the element types, how a page lies in memory, and this version.

    Every weight, since a page of a model that differs in one of them would be wrong for as long as the disk keeps it.
    """
    config = {name: value for name, value in loaded.model.config.to_dict().items() if name not in _IGNORED}
    about = {
        "version": __version__,
        "format": FORMAT_VERSION,
        "config": config,
        "fingerprint": fingerprint(loaded.model),
        "weights": weights_digest(loaded.model),
        "dtype": str(loaded.dtype),
        "quantization": options.quantization,
        "kv_dtype": str(geometry.dtype),
        "layers": geometry.num_layers,
        "kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "page_size": geometry.page_size,
        "statistics": _STATISTICS,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).digest()
