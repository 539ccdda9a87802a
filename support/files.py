"""Files: written whole or not at all, owned by one command at a time, checked when they are read, fetched once.

What is read from outside is distrusted here: a file must be a regular one, its text UTF-8, its JSON of a declared
`Shape`. Every fault is one InputError that names the file, the field, the value and the reason.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
import errno
import fnmatch
from functools import cache
import json
import os
from pathlib import Path
import shutil
import sys
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from support.cli import InputError, Progress, RunError, first_line, process_rank, reason, visible
from support.later import when_used

with when_used():
    import huggingface_hub
    from huggingface_hub import constants
    import psutil

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none, some of a cluster's
Value = TypeVar("Value")

# ----------------------------------------------------------------------------------------------------------------------
# Reading


class Shape(BaseModel):
    """The declared shape of a JSON object: exact types, finite numbers; fields that nothing reads may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="ignore")


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a regular file; a FIFO would be waited for, a device read for ever. Raises InputError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_regular(folder: Path) -> None:
    """Raises InputError for a FIFO or a device in a folder: a library that opens files itself would wait for it."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is not a regular file")


def read_text(path: str | os.PathLike) -> str:
    """Content of a regular file of UTF-8 text without its byte-order mark. Raises InputError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def check(shape: type[Value], value: object, where: str | os.PathLike) -> Value:
    """`value` as `shape` (a Shape or any type of fields) has it. Raises InputError that starts with `where`."""
    try:
        return _adapter(shape).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{where}: {reason(error)}") from error


def check_json(shape: type[Value], text: str, where: str | os.PathLike) -> Value:
    """JSON text as `shape` has it. Raises InputError that starts with `where`."""
    try:
        return _adapter(shape).validate_json(text)
    except ValidationError as error:
        raise InputError(f"{where}: {reason(error)}") from error


def read_json(path: str | os.PathLike, shape: type[Value]) -> Value:
    """A JSON file of the shape. Raises InputError."""
    return check_json(shape, read_text(path), path)


def read_lines(path: str | os.PathLike, shape: type[Value], cut_off: bool = False) -> list[Value]:
    """A file with a JSON object of the shape in every line, as a list. Raises InputError naming the first wrong line.

    cut_off: a last line without its end is left out: its writer was killed.
    """
    *lines, rest = read_text(path).split("\n")  # not splitlines, which cuts at other characters too
    if rest and not cut_off:
        lines.append(rest)
    return [check_json(shape, line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


@cache
def _adapter(shape):
    return TypeAdapter(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Writing

OURS = "pronunciation"  # begins the name of a lock
NEW = f".{OURS}-new-"  # and of what is being written; the number of the process follows


def signature(command: str) -> str:
    """What the file that marks a folder says of its writer, such as "pronunciation/train.py"."""
    return f"{OURS}/{command}"


@contextmanager
def own(folder: Path, command: str, mark: str, writes: Iterable[str], setting: str = "--output") -> Iterator[None]:
    """Own a folder for one command, such as "train.py": the one rule for what may be overwritten.

    A lock keeps a second start of the command out. Then the folder must be new to the command: nothing in it has a name
    of `writes` (glob patterns), or the file `mark` in it says `"pronunciation/COMMAND"`, as the command writes it
    before all else. Makes the folder, and removes what a killed start of the command left half written. The system
    frees the lock with the process, however that ends. Raises InputError. Rank 0 owns for all.
    """
    if process_rank():
        yield
        return
    lock = FileLock(folder / f".{OURS}-{Path(command).name}.lock", timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder} is in use by another {command}: wait until it ends, or choose another {setting}"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            reason = f"{error.strerror} ({error.filename})"
            raise InputError(f"cannot write into {folder}: {reason}; choose another {setting}") from error
        print(visible(f"{folder} cannot be locked: see to it that no other run writes into it"), file=sys.stderr)
    try:
        _check_ours(folder, command, mark, writes, setting)
        for pattern in writes:
            remove_left(folder, pattern)
        yield
    finally:
        lock.release()


def remove_left(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left half written of names like `pattern`; what a living one writes stays."""
    for left in folder.glob(f"{NEW}*-{pattern}"):
        process = left.name.removeprefix(NEW).split("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            _remove(left)


def _check_ours(folder, command, mark, writes, setting):
    there = sorted(name for pattern in writes for name in fnmatch.filter(os.listdir(folder), pattern))
    try:
        ours = f'"{signature(command)}"' in read_text(folder / mark)
    except InputError:
        ours = False
    if there and not ours:
        raise InputError(
            f"{folder / there[0]} is there already, and no {mark} beside it says that {command} wrote it: choose "
            f"another {setting}, or move it away"
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder; what is written there is synced to disk, then renamed to `path`.

    A folder is replaced only by one that has all of its files: any other holds something that was not written here.
    Raises RunError when it cannot be written. Whatever is raised, `path` then is as it was, and nothing stays beside
    it. Only rank 0 writes: what other processes write goes nowhere.
    """
    if process_rank():
        yield Path(os.devnull)
        return
    temporary = path.with_name(f"{NEW}{os.getpid()}-{path.name}")
    try:
        _remove(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        if path.is_dir():
            if foreign := _names(path) - _names(temporary):
                what = f"it holds {min(foreign)}, which was not written here: move that folder away"
                raise RunError(f"{path} cannot be written: {what}")
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        _remove(temporary)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(f"{path} cannot be written: {reason}") from error


def write_json(path: Path, values: Any) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _names(folder):
    return {file.relative_to(folder) for file in folder.rglob("*")}


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # unlink(missing_ok=True) raises below what is a file
        path.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# The Hugging Face hub: what is there is downloaded once, and from then on it is a folder
#
# With HF_HUB_OFFLINE=1, or without a network, the folder comes from the cache (below HF_HOME), as on the compute nodes
# of most clusters. A revision such as refs/pr/70 moves; the commit does not.


def fetch(name: str | Path, revision: str | None, kind: str, patterns: Iterable[str]) -> tuple[Path, str | None]:
    """The folder of a model or data set, and the commit that it is of; a folder is returned as it is, with None.

    name: folder or hub id; revision: of the hub id; kind: "model" or "dataset"; patterns: of the files that are needed.
    Raises InputError when a hub id is neither within reach nor whole in the cache.
    """
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = huggingface_hub.snapshot_download(
            str(name), revision=revision, repo_type=kind, allow_patterns=[*patterns], tqdm_class=Progress
        )
    except Exception as error:  # the hub, HTTP, Xet and the disk each have their own
        raise InputError(
            f"{kind} {name} is not a folder here, revision {revision or 'main'} of it is not whole in the cache "
            f"{constants.HF_HUB_CACHE}, and the hub does not give it: {type(error).__name__}: {first_line(error)}; "
            f"give a folder or another id, log in (hf auth login), or start once where there is a network"
        ) from error
    return Path(folder), Path(folder).name
