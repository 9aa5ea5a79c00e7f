"""Options of each scheme for the tests that every scheme gets; one that is not named here is tested with its defaults.

The tests run 4 query heads, 2 KV heads of dim 16, 2 layers, pages of 16 tokens, up to 150 tokens.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.calibration.threshold_table import VARIANTS, ThresholdTable
from foveate.sparse_attn.profile import Profile

# What their defaults would keep of so few tokens leaves no choice.
_BARE: dict[str, object] = {"sink_tokens": 0, "window_tokens": 0}
_QUEST = _BARE | {"dense_first_layers": 0, "sparse_prefill": True, "tile_tokens": 32}
_XATTENTION = _BARE | {"block_tokens": 16, "stride_tokens": 4}
# Small budgets, so that something is left out; tiles of at most 32.
_TIGHT: dict[str, dict[str, object]] = {
    "streaming": {"budget_tokens": 24, "sink_tokens": 3},
    "moba": {"block_tokens": 16, "top_k": 3, "dense_last_layers": 0},
    "dhsa": {
        "budget_tokens": 20,
        "block_tokens": 32,
        "chunk_tokens": 16,
        "segment_tokens": 32,
        "sink_tokens": 3,
        "window_tokens": 5,
        "dense_tail_tokens": 0,
    },
    "dhsa_block": {
        "budget_tokens": 32,
        "query_block_tokens": 32,
        "key_block_tokens": 16,
        "sink_tokens": 3,
        "window_tokens": 5,
        "dense_tail_tokens": 0,
    },
    "quest": _QUEST | {"budget_tokens": 32, "min_pages": 1, "sink_tokens": 3, "window_tokens": 10},
    "xattention": _XATTENTION | {"tau": 0.5},
    "exact_topk": {
        "budget_tokens": 12,
        "tile_tokens": 16,
        "sink_tokens": 2,
        "window_tokens": 5,
        "dense_first_layers": 0,
    },
    "kascade": {"budget_tokens": 12, "tile_tokens": 16, "sink_tokens": 2, "window_tokens": 5, "dense_first_layers": 0},
    "top_theta": {
        "budget_tokens": 12,
        "first_layers_budget_tokens": 0,
        "sink_tokens": 2,
        "window_tokens": 5,
        "gqa": "union",
    },
    "composed": {
        "prefill": {"scheme": "xattention", **_XATTENTION, "budget_tokens": 32},
        "decode": {"scheme": "quest", **_QUEST, "budget_tokens": 32, "group": "softmax"},
    },
}
# Learned sinks weigh the heads that choose together, so with them other keys are chosen.
SINKS_CHANGE_THE_CHOICE = {"exact_topk", "kascade"}
# Budgets beyond every length. A scheme not named here is given ``budget_tokens``, if it has that.
_ROOMY: dict[str, dict[str, object]] = {
    "quest": _QUEST | {"budget_tokens": 1000},
    "xattention": _XATTENTION | {"tau": 1.0},
    "composed": {
        "prefill": {"scheme": "xattention", **_XATTENTION, "budget_tokens": 1000},
        "decode": {"scheme": "quest", **_QUEST, "budget_tokens": 1000},
    },
}


def kascade_profile(anchors: list[int], head_map: list[list[int]]) -> Profile:
    tensors = {"anchors": torch.tensor(anchors), "head_map": torch.tensor(head_map)}
    named = {f"{name}.{len(anchors)}": tensor.int() for name, tensor in tensors.items()}
    return Profile("kascade", {}, {"chosen_anchors": len(anchors)}, "", named)


def top_theta_profile() -> Profile:
    """About what scores of random keys and queries would teach, with some spread over layers and heads."""
    sizes, budgets = torch.tensor([16, 64, 256]), torch.tensor([4, 16, 64, 1024])
    share = (budgets / sizes[:, None]).clamp(max=0.99)
    generator = torch.Generator().manual_seed(0)
    theta = 1.4 * torch.erfinv(1 - 2 * share) + 0.2 * torch.randn(5, 4, 1, 1, generator=generator)
    table = ThresholdTable((0, 1, 2, 3, 4), sizes, budgets, theta, torch.zeros_like(theta))
    tensors = {name: tensor for variant in VARIANTS for name, tensor in table.tensors(variant, torch.float32).items()}
    return Profile("top_theta", {}, {}, "", tensors)


# Profiles of the model that these tests pretend to run.
PROFILES: dict[str, Profile] = {
    "top_theta": top_theta_profile(),
    # Its second layer reuses the first, with heads exchanged.
    "kascade": kascade_profile([0, 3], [[0, 1], [1, 0], [0, 0], [0, 1], [1, 1]]),
}


def tight(name: str) -> dict[str, object]:
    return _TIGHT.get(name, {})


def roomy_options(name: str) -> dict[str, object]:
    if name in _ROOMY:
        return _ROOMY[name]
    known = {item.name for item in fields(registry.load(name).Options)}
    return {"budget_tokens": 1000} if "budget_tokens" in known else {}
