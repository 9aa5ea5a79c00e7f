"""``foveate.attach`` on a tiny model equals stock ``transformers`` with the naive masks in place of its attention."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers.models.llama import modeling_llama

import foveate
from foveate.sparse_attn import registry

from ..cases import kascade_profile
from .chunks import fixed
from .oracle import PURE, attention, causal
from .test_dhsa import answer_mask, dhsa_mask
from .test_dhsa_block import block_mask
from .test_kascade import answer_masks, prompt_masks
from .test_moba import moba_mask
from .test_quest import NOTHING_DENSE, quest_mask
from .test_top_theta import read, table, top_theta
from .test_xattention import xattention_mask

TOKENS, PAGE = 117, 16
ANCHORS, MAP = [0, 1], [[0, 1], [0, 1], [1, 0]]


class Stock:
    """Queries, keys and values of the layers so far, as ``oracle.Text`` holds them; unknown queries are zero."""

    group = 2

    def __init__(self):
        self.q, self.k, self.v = [], [], []

    def add(self, query, key, value, scale):
        (q, k, v), self.scale = (part[0].transpose(0, 1) for part in (query, key, value)), scale
        self.tokens, rows = len(k), len(q)
        self.q.append(torch.cat([q.new_zeros(len(k) - rows, *q.shape[1:]), q]))
        self.k.append(k)
        self.v.append(v)

    @property
    def layers(self):
        return len(self.q)


def dense(text, layer, prompt):
    return causal(text.tokens).expand(4, -1, -1)


def last_layer(text):
    """The newest layer as a text of one."""
    one = Stock()
    one.q, one.k, one.v, one.tokens, one.scale = text.q[-1:], text.k[-1:], text.v[-1:], text.tokens, text.scale
    return one


def moba(text, layer, prompt):
    return moba_mask(text.q[layer], text.k[layer], 16, 3, every_row=prompt)


def kascade(text, layer, prompt):
    stacked = Stock()
    stacked.q, stacked.k, stacked.v = torch.stack(text.q), torch.stack(text.k), torch.stack(text.v)
    stacked.tokens, stacked.scale = text.tokens, text.scale
    masks = (
        prompt_masks(stacked, ANCHORS, MAP, 16, budget_tokens=9)
        if prompt
        else answer_masks(stacked, ANCHORS, MAP, budget_tokens=9)
    )
    return masks[layer]


def dhsa(text, layer, prompt):
    cuts = fixed(text.tokens if prompt else text.tokens - 1, 16)
    return dhsa_mask(text, 20, lambda start: cuts, layer=layer) if prompt else answer_mask(text, 20, cuts, layer=layer)


def dhsa_block(text, layer, prompt):
    return block_mask(last_layer(text), 4, 32, 16) if prompt else dense(text, layer, prompt)


def quest(text, layer, prompt):
    return dense(text, layer, prompt) if prompt else quest_mask(text.q[layer], text.k[layer], PAGE, 2)


def xattention(text, layer, prompt):
    return xattention_mask(last_layer(text), 4, 16, 0.6) if prompt else dense(text, layer, prompt)


def composed(text, layer, prompt):
    return xattention(text, layer, prompt) if prompt else moba(text, layer, prompt)


LEARNT = table(3, theta=0.0)
XATTENTION = {"scheme": "xattention", "block_tokens": 16, "stride_tokens": 4, "tau": 0.6} | PURE
MOBA = {"scheme": "moba", "block_tokens": 16, "top_k": 3, "dense_last_layers": 0, "sparse_decode": True} | PURE
QUEST = {"scheme": "quest", "budget_tokens": 32, "min_pages": 1} | NOTHING_DENSE | PURE
CASES = {
    "dense": (dense, "dense"),
    "moba": (moba, MOBA),
    "dhsa": (dhsa, {"scheme": "dhsa", "budget_tokens": 20, "block_tokens": 32, "share_heads": "all"} | PURE),
    "dhsa_block": (
        dhsa_block,
        {"scheme": "dhsa_block", "budget_tokens": 64, "query_block_tokens": 32, "key_block_tokens": 16}
        | {"budget_includes_kept": True}
        | PURE,
    ),
    "quest": (quest, QUEST),
    "xattention": (xattention, XATTENTION),
    "composed": (composed, {"scheme": "composed", "prefill": XATTENTION, "decode": MOBA}),
    "kascade": (
        kascade,
        registry.build("kascade", {"kascade": kascade_profile(ANCHORS, MAP)}, **PURE, budget_tokens=9, tile_tokens=16),
    ),
    "top_theta": (None, top_theta(LEARNT, budget_tokens=16)),
}


@pytest.fixture
def llama(tiny_llama):
    """With queries as long as those of a model that has learnt to choose."""
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight.mul_(16)
        yield tiny_llama
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight.div_(16)


@contextmanager
def naive(model, mask_of, monkeypatch):
    """Stock code, but for what its attention reads; ``mask_of`` ``None`` is top-theta's own softmax."""
    text = Stock()

    def forward(module, query, key, value, attention_mask, scaling, **kwargs):
        if module.layer_idx == 0:
            text.q, text.k, text.v = [], [], []
        text.add(query, key, value, scaling)
        layer, rows = module.layer_idx, query.shape[2]
        if mask_of is None:
            out = read(text, LEARNT, 16, layer)[-rows:]
        else:
            mask = mask_of(text, layer, rows > 1)[:, -rows:]
            out = attention(text.q[layer][-rows:], text.k[layer], text.v[layer], mask, scaling)
        return out[None].to(query.dtype), None

    before = model.config._attn_implementation
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", forward)
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_prompt_and_an_answer(case, llama, monkeypatch):
    mask_of, policy = CASES[case]
    # A score so near its threshold that it may fall on either side is likely among many.
    ids = torch.randint(2, 256, (1, 40 if case == "top_theta" else TOKENS))

    def logits():
        prompt = llama(ids[:, :-1])
        after = llama(ids[:, -1:], past_key_values=prompt.past_key_values)
        return torch.cat([prompt.logits, after.logits], 1)[0]

    whole = logits()
    with naive(llama, mask_of, monkeypatch):
        want = logits()
    with foveate.attach(llama, policy, page_size=PAGE) as attached:
        got = logits()
        assert (attached.keys_read_fraction < 1) == (case != "dense")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    if case != "dense":
        assert (got - whole).abs().max() > 1e-2


@torch.no_grad()
def test_the_tail_of_a_prompt_is_dense(llama, monkeypatch):
    ids = torch.randint(2, 256, (1, TOKENS))

    def mask_of(text, layer, prompt):
        mask = moba(text, layer, True).clone()
        mask[:, -21:] = causal(TOKENS)[-21:]
        return mask

    with naive(llama, mask_of, monkeypatch):
        want = llama(ids).logits
    with foveate.attach(llama, MOBA | {"dense_tail_tokens": 21}, page_size=PAGE):
        got = llama(ids).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
