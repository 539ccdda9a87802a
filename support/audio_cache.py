"""Audio embeddings on disk: a recording goes through a frozen encoder once; later epochs and runs read the result."""

import hashlib
import os
from pathlib import Path
import zlib

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
import torch
import transformers

from support.cli import RunError


def digest(encoder, extractor):
    """Names all that the embeddings of a recording depend on, besides the recording."""
    weights = encoder.state_dict()
    device = next(iter(weights.values())).device.type
    found = hashlib.sha256(repr((torch.__version__, transformers.__version__, device)).encode())
    found.update(extractor.to_json_string().encode())
    found.update(encoder.config.to_json_string().encode())
    for name, weight in weights.items():
        found.update(f"{name} {weight.dtype} {[*weight.shape]}".encode())
        found.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


class AudioCache:
    """Embeddings of recordings, a file each, named by the content of the recording.

    folder: for one set of weights (SpeechModel.keep_audio names it after them). Files are read through a memory map.
    A file appears whole or not at all, and one whose checksum does not fit is as good as none.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def file(self, recording):
        """Where the embeddings of a recording, given as the bytes of its sound file, are or will be."""
        name = hashlib.blake2b(recording, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, file):
        """Embeddings (A, D), or None if they are not there."""
        try:
            with safe_open(file, framework="pt") as opened:
                embeddings = opened.get_tensor("embeddings")
                whole = opened.metadata()["crc32"] == _checksum(embeddings)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        return embeddings if whole else None

    def write(self, file, embeddings):
        """Keep embeddings (A, D), on the CPU. Processes that write the same file write the same content."""
        content = save({"embeddings": embeddings}, {"crc32": _checksum(embeddings)})
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            if file.parent.is_dir():
                temporary.unlink(missing_ok=True)
            raise RunError(
                f"audio embeddings cannot be kept in {self.folder}: {error.strerror}; choose another --audio-cache"
            ) from error


def _checksum(tensor):
    return str(zlib.crc32(tensor.view(torch.uint8).numpy()))
