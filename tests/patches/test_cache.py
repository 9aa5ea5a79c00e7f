"""A cache of pages that stands where ``transformers`` has one of its own."""

from __future__ import annotations

import copy

import pytest
import torch

from foveate.patches.attach import attach
from foveate.patches.errors import AttachError


@torch.no_grad()
def test_a_copy_goes_on_by_itself_from_shared_pages(tiny, tokens):
    """The recipe of transformers for several answers behind one prefix."""
    llama = tiny("llama")
    prefix, endings = tokens(1, 30), [tokens(1, 6, seed=seed) for seed in (1, 2)]
    prompts = [torch.cat([prefix, ending], dim=1) for ending in endings]
    want = [llama.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    with attach(llama, page_size=16) as attached:
        past = llama(prefix).past_key_values
        pages = attached.manager.num_pages_in_use
        copied = copy.deepcopy(past)
        assert copied.manager is past.manager
        assert (copied.get_seq_length(), copied.batch_size, attached.manager.num_pages_in_use) == (30, 1, pages)
        got = [
            llama.generate(prompt, past_key_values=copy.deepcopy(past), max_new_tokens=6, do_sample=False)
            for prompt in prompts
        ]
        assert past.get_seq_length() == 30
        del past
        assert attached.manager.num_pages_in_use == pages
    assert all(map(torch.equal, got, want))
    assert attached.manager.num_pages_in_use == 0
    with pytest.raises(AttachError, match="detached"):
        copied.begin([1], None)
    with pytest.raises(AttachError, match="detached"):
        copy.deepcopy(copied).begin([1], None)
