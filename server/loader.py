"""From a name to a model whose attention is ours, with its tokenizer and its facts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.patches.attach import Attached, attach_engine
from foveate.patches.errors import UnsupportedModel
from foveate.patches.families import VERIFIED, ModelFacts, facts
from foveate.patches.fingerprint import fingerprint
from foveate.patches.profiles import profiles_for, read_profiles
from foveate.patches.quantize import quantize
from foveate.patches.rotary import ModelRotary
from foveate.patches.tune import tune
from foveate.patches.verify import try_pass, verify
from foveate.sparse_attn.ops.cpu import has_bfloat16_products
from foveate.sparse_attn.profile import Profile

from .exceptions import InvalidRequest, ModelNotLoaded
from .free_memory import free_bytes
from .memory import tune_allocator
from .options import EngineOptions
from .packaged import resolve

log = logging.getLogger(__name__)

# Share of free memory that the KV cache may take when nothing is said. The weights are loaded by then.
FREE_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}
_NAMED = 3  # weights that an error names


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """
    Attributes:
        name: What clients call it.
        model: The causal LM, attached.
        tokenizer: Its ``transformers`` tokenizer.
        attached: The attachment, with the model's facts.
        rotary: For schemes that move positions; ``None`` if its rotary embedding is of an unknown kind.
        context_length: Tokens of prompt and answer.
        vocab_size: Width of the logits.
        eos_token_ids: Ids that end a text.
        profiles: Calibration profiles of this model, by scheme.
    """

    name: str
    model: Any
    tokenizer: Any
    attached: Attached
    rotary: ModelRotary | None
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    profiles: Mapping[str, Profile]

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype


def load(options: EngineOptions) -> LoadedModel:
    """Loads weights (safetensors only) and tokenizer, and attaches our attention.

    What can be refused without the weights, which may take minutes to read, is refused before.

    Raises:
        ModelNotLoaded: nothing can be loaded under that name, or what is there is damaged or not whole.
        FileNotFoundError: it can only be a directory, and there is none.
        PackagedModelError: the packaged model cannot be fetched.
        UnsupportedModel: it is no language model, or its attention cannot be ours; the message says why.
        QuantizationError: its weights cannot be quantised so, or it is not on a CPU.
        InvalidRequest: an option does not fit the model, or there is no such device.
        ProfileError: a profile cannot be read, or was made for another model.
    """
    device = device_of(options.device)
    check_kv_dtype(options, device)
    config = config_of(options)
    made_by = _auto_class(config)
    _context(facts(config), options)
    read_profiles(options.profile)
    if device.type == "cpu":
        tune_allocator()
    with _telling():
        model, tokenizer = _read(config, made_by, options, device)
    return ready(model, tokenizer, options)


def config_of(options: EngineOptions) -> PreTrainedConfig:
    """The configuration of a model, which may be downloaded for it.

    Raises:
        ModelNotLoaded: there is none under that name, or it cannot be read.
        FileNotFoundError: it can only be a directory, and there is none.
        PackagedModelError: the packaged model cannot be fetched.
    """
    path = resolve(options.model)
    with _telling():
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=options.trust_remote_code
        )
    return config


@contextmanager
def _telling() -> Iterator[None]:
    """What libraries raise, as ``ModelNotLoaded``."""
    try:
        yield
    except ModelNotLoaded:
        raise
    except (OSError, ValueError) as error:  # in whole sentences
        raise ModelNotLoaded(str(error)) from error
    except Exception as error:  # what is wrong with a file, each library tells by classes of its own
        raise ModelNotLoaded(f"the model cannot be read: {error or type(error).__name__}") from error


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class of ``transformers`` that reads the weights. Of a model that sees, too, only text is served.

    Raises:
        UnsupportedModel: there is none, since it is no language model.
    """
    causal: Any = transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return causal
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    if causal.__name__ in (getattr(config, "auto_map", None) or {}):  # code that comes with the checkpoint
        return causal
    made = ", ".join(config.architectures or ()) or type(config).__name__
    raise UnsupportedModel(
        f"transformers reads {config.model_type} ({made}) neither as a causal language model nor as one that also sees"
    )


def _read(config: PreTrainedConfig, made_by: Any, options: EngineOptions, device: torch.device) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer.

    Raises:
        ModelNotLoaded: the weights are not all there, or some have another shape than the configuration says.
        Exception: whatever a library says of a file that it cannot read.
    """
    path, common = resolve(options.model), {"trust_remote_code": options.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **common)
    loaded: Any = made_by.from_pretrained(
        path,
        config=config,
        dtype=dtype_of(options.dtype, device),
        attn_implementation="eager",
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        output_loading_info=True,
        **common,
    )
    model, found = loaded
    # What a checkpoint lacks the library draws at random, and only warns. Tied weights are not among these.
    lacking = sorted({*found["missing_keys"], *(item[0] for item in found["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise ModelNotLoaded(
            "the checkpoint does not hold every weight, or some in another shape than its configuration says: "
            f"{', '.join(lacking[:_NAMED])}{more}"
        )
    model.train(False)
    model.requires_grad_(False)
    torch.nn.Module.to(model, device)  # the library's own `to` is typed for something else
    return model, tokenizer


def ready(model: Any, tokenizer: Any, options: EngineOptions) -> LoadedModel:
    """Makes a model that is on its device serve: verified if need be, quantised, attached.

    Raises:
        UnsupportedModel: the model's attention cannot be ours; the message says why.
        QuantizationError: its weights cannot be quantised so, or it is not on a CPU.
        InvalidRequest: an option does not fit the model.
        ProfileError: a profile cannot be read, or was made for another model.
    """
    found = facts(model.config)
    family: str = model.config.model_type  # of the whole, whose own code passes on what its text part needs
    verified, rounds = family in VERIFIED, options.quantization != "none"
    if not verified:
        log.info("%s is not a verified family: comparing its logits with stock attention", family)
        # Rounded weights give other logits, so of such a model what tuning makes is only tried layer by layer.
        verify(model, None if rounds else tune).raise_on_failure()
    if rounds:
        quantize(model, options.quantization)
    if verified or rounds:
        tune(model)
        try_pass(model)
    context = _context(found, options)
    name = options.served_model_name or os.path.basename(os.path.normpath(options.model))
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        attached=attach_engine(model),
        rotary=ModelRotary.of(model),
        context_length=context,
        vocab_size=found.vocab_size,
        eos_token_ids=_eos(model, tokenizer),
        profiles=profiles_for(fingerprint(model), options.profile),
    )


def _context(found: ModelFacts, options: EngineOptions) -> int:
    """Tokens of prompt and answer.

    Raises:
        InvalidRequest: more are asked for than the model has positions for.
    """
    context = options.max_context or found.context_length
    if context > found.context_length:
        raise InvalidRequest(
            f"max_context {context} exceeds the model's context of {found.context_length}", param="max_context"
        )
    return context


def geometry_for(loaded: LoadedModel, options: EngineOptions) -> CacheGeometry:
    """Sizes of the KV pool: what ``kv_cache_gib`` allows, but no more than ``max_running`` full contexts.

    Raises:
        InvalidRequest: not one page fits, or the device cannot read pages of ``kv_dtype``.
    """
    found, device = loaded.attached.facts, loaded.device
    check_kv_dtype(options, device)
    page_size = options.page_size or default_page_size(device)
    dtype = torch.int8 if options.kv_dtype == "int8" else loaded.dtype
    geometry = CacheGeometry(found.num_layers, found.num_kv_heads, found.head_dim, page_size, 1, dtype, device)
    if options.kv_cache_gib is None:
        allowed = int(_free_bytes(device) * FREE_MEMORY_SHARE[device.type])
    else:
        allowed = int(options.kv_cache_gib * 2**30)
    most = geometry.pages_for(loaded.context_length + 1) * options.max_running
    pages = min(allowed // geometry.bytes_per_page, most)
    if pages < 1:
        raise InvalidRequest(
            f"a KV cache of {allowed / 2**30:.3f} GiB holds no page of {geometry.bytes_per_page / 2**20:.1f} MiB",
            param="kv_cache_gib",
        )
    log.info(
        "KV cache: %d pages of %d tokens, %d bytes per token in %s",
        pages, page_size, geometry.bytes_per_token, str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return replace(geometry, num_pages=pages)


def check_kv_dtype(options: EngineOptions, device: torch.device) -> None:
    """
    Raises:
        InvalidRequest: no kernel of the device reads such pages.
    """
    if options.kv_dtype == "int8" and device.type != "cpu":
        raise InvalidRequest(
            f"kv_dtype int8 is for the CPU kernels; on {device} leave it out, or choose --device cpu", param="kv_dtype"
        )


def device_of(name: str) -> torch.device:
    """
    Raises:
        InvalidRequest: this torch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device {name!r}: choose auto, cpu, cuda or cuda:N", param="device")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InvalidRequest(f"device {name}: this torch can use no GPU; try cpu", param="device")
        if (device.index or 0) >= count:
            raise InvalidRequest(f"device {name}: this torch can use cuda:0 to cuda:{count - 1}", param="device")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype | str:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    # Without bfloat16 instructions a bfloat16 GEMM ran at 20 GFLOP/s where float32 ran at 90.
    if device.type == "cpu" and not has_bfloat16_products():
        return torch.float32
    return "auto"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes()


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    given = model.generation_config.eos_token_id
    ids = given if isinstance(given, list) else [given]
    return frozenset(item for item in (*ids, tokenizer.eos_token_id) if item is not None)
