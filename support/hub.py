"""The Hugging Face hub: what is there is downloaded once, and from then on it is a folder.

With HF_HUB_OFFLINE=1, or without a network, the folder comes from the cache (below HF_HOME), as on the compute nodes of
most clusters. A revision such as refs/pr/70 moves; the commit does not.
"""

from collections.abc import Iterable
from pathlib import Path
import sys

from tqdm import tqdm

from support import screen
from support.cli import InputError, first_line, process_rank
from support.later import when_used

with when_used():
    import huggingface_hub
    from huggingface_hub import constants, errors

MOMENT = 1  # seconds; a look into the cache takes less, and shows nothing


def fetch(name: str, revision: str | None, kind: str, patterns: Iterable[str]) -> tuple[Path, str | None]:
    """The folder of a model or data set, and the commit that it is of; a folder is returned as it is, with None.

    name: folder or hub id; revision: of the hub id; kind: "model" or "dataset"; patterns: of the files that are needed.
    Raises InputError when a hub id is neither within reach nor whole in the cache.
    """
    if Path(name).is_dir():
        return Path(name), None
    wanted = {"repo_id": str(name), "revision": revision, "repo_type": kind}
    try:
        if not _listed(wanted):
            # says at once what snapshot_download would say after half a minute's attempts
            huggingface_hub.HfApi().repo_info(**wanted)
        folder = Path(huggingface_hub.snapshot_download(**wanted, allow_patterns=patterns, tqdm_class=_Bar))
    except Exception as error:  # the hub, HTTP, Xet and the disk each have their own
        raise InputError(
            f"{kind} {name} is not a folder here, revision {revision} of it is not whole in the cache "
            f"{constants.HF_HUB_CACHE}, and the hub does not give it: {_reason(error)}; give a folder or "
            f"another id, or start once where there is a network"
        ) from error
    return folder, folder.name


def size(name: str, commit: str | None, kind: str, wanted: Iterable[str]) -> int:
    """Bytes of the files of these names in a folder, or in a commit that `fetch` has seen, downloaded or not."""
    if not commit:
        return sum(file.stat().st_size for file in map(Path(name).joinpath, wanted) if file.is_file())
    listed = _listed({"repo_id": str(name), "revision": commit, "repo_type": kind})
    return sum(file.size for file in listed if file.path in wanted)


def _listed(wanted):
    """The files of a revision as the hub listed them when it was last fetched; none if it never was."""
    try:
        return huggingface_hub.get_cached_repo_tree(**wanted)
    except errors.CachedRepoTreeNotFoundError:
        return []


def _reason(error):
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is none of this name that may be read (if it is yours: hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    return first_line(error.__cause__ or error).rstrip(".")


class _Bar(tqdm):
    """Shows the progress of rank 0, on a terminal, once it takes more than a moment."""

    def __init__(self, *args, **kwargs):
        kwargs |= {"delay": MOMENT, "disable": process_rank() > 0 or None, "ncols": screen.width(sys.stderr)}
        super().__init__(*args, **kwargs)

    def display(self, *args, **kwargs):
        if self._time() - self.start_t > MOMENT:  # a new description is shown without regard to `delay`
            super().display(*args, **kwargs)
