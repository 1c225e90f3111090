"""Random models of real shapes and their adapters, kept in the user's cache: for `deltamem bench --synthetic`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import hub
from ..errors import InputError, OutputError
from ..runtime.quantize import file_type, quantize
from ..version import __version__
from .synthetic import FTYPES, SHAPES, write_adapter_checkpoint, write_model

# the vocabulary of each architecture, in llama.cpp's folder models
VOCABULARIES = {"qwen3": "ggml-vocab-qwen2.gguf", "smollm3": "ggml-vocab-llama-bpe.gguf"}


def cache_folder() -> Path:
    """The folder of files that can be made again. One per version: another version may make other files."""
    return hub.cache_folder() / __version__


def synthetic_files(
    shape: str,
    ftype: str,
    outtype: str,
    rank: int,
    n_head: int,
    vocab: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str]:
    """Paths of a random model and of an adapter for it, made if they are missing.

    Args:
        shape: one of SHAPES.
        ftype: any of llama.cpp's, by llama-quantize's name; what write_model() cannot make is quantised from F16.
        outtype: type of the adapter's weights, as `deltamem convert --outtype`.
        rank, n_head: of the adapter, which otherwise is like the released one.
        vocab: GGUF whose vocabulary the model takes; None: that of the build in this checkout.
        progress: called with (bytes, bytes in all) while the model is written.

    Raises InputError if there is no such type or no vocabulary, OutputError if the cache cannot be written, ModelError
    or CheckpointError.
    """
    from ..convert.adapter import write_adapter
    from ..formats.base_model import Base
    from ..formats.checkpoint import Checkpoint

    file_type(ftype)
    cache, ftype = cache_folder(), ftype.lower()
    model = cache / f"{shape}-{ftype}.gguf"
    adapter = cache / f"{shape}-adapter-r{rank}-h{n_head}-{outtype}.gguf"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not model.exists():
            _write_model(model, shape, ftype, vocab or _vocabulary(SHAPES[shape].architecture), progress)
        if not adapter.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                write_adapter_checkpoint(
                    folder,
                    model,
                    rank=rank,
                    num_state_heads=n_head,
                    delta_heads=["q", "o"],
                    couple_lambda=True,
                    rankwise_gates=True,
                    normalize_qk=True,
                )
                write_adapter(Checkpoint(folder), Base(model), adapter, outtype, f"random, {shape}")
    except OSError as error:
        raise OutputError(f"{cache}: cannot hold the files of --synthetic: {error.strerror}") from error
    return str(model), str(adapter)


def _write_model(
    path: Path, shape: str, ftype: str, vocab: str | Path, progress: Callable[[int, int], None] | None
) -> None:
    if ftype in FTYPES:
        write_model(path, shape, vocab, ftype, progress=progress)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = path.with_name(f"{shape}-f16.gguf")
        if not source.exists():
            source = Path(folder) / source.name
            write_model(source, shape, vocab, "f16", progress=progress)
        quantize(source, path, ftype)


def _vocabulary(architecture: str) -> Path:
    """The vocabulary in the source that the checkout's build unpacked; else its copy from the download in the cache."""
    name = VOCABULARIES[architecture]
    kept = cache_folder() / name
    build = Path(__file__).resolve().parents[2] / "build" / "native"
    for path in (build / "llama.cpp" / "models" / name, kept):
        if path.is_file():
            return path
    for archive in sorted((build / "download").glob("llama_cpp_python-*.tar.gz")):
        member = f"{archive.name[: -len('.tar.gz')]}/vendor/llama.cpp/models/{name}"
        with contextlib.suppress(tarfile.TarError, KeyError, EOFError), tarfile.open(archive) as tar:
            source = tar.extractfile(member)
            if source is None:  # no file
                continue
            temporary = kept.with_name(f".{name}.{os.getpid()}.tmp")
            try:
                with open(temporary, "wb") as file:
                    shutil.copyfileobj(source, file)
                os.replace(temporary, kept)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            return kept
    raise InputError(f"no vocabulary for --synthetic in {build}: name llama.cpp's models/{name} by --vocab")
