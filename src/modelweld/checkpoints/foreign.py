"""What a file is that was named .safetensors and is none."""

from __future__ import annotations

from pathlib import Path

from modelweld.errors import CheckpointError

SIGNATURE_BYTES = 64
_CONVERT = "save the model as safetensors: model.save_pretrained(directory)"
_PICKLE = "is a pickle, which can run code when it is read"
_ZIP = "is a pickle in a zip archive, as torch.save writes them"
# By the first bytes of the file.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "run `git lfs pull` in the repository"),
    (b"GGUF", "is a GGUF file", "load it with transformers (gguf_file=…) and save it with save_pretrained"),
    (b"PK\x03\x04", _ZIP, _CONVERT),
    (b"\x89HDF", "is an HDF5 file, as Keras writes", _CONVERT),
    (b"\x1f\x8b", "is compressed by gzip", "decompress it"),
    (b"<!doctype", "is a web page", "download the file itself: the address led to a page, of a login or an error"),
    (b"<html", "is a web page", "download the file itself: the address led to a page, of a login or an error"),
    (b"<?xml", "is an XML document", "download the file itself: the address led to an error"),
    (b"{", "is a JSON text", "download the file itself: the address led to a message of the server"),
    *((b"\x80" + bytes([protocol]), _PICKLE, _CONVERT) for protocol in range(2, 6)),
)


def refuse_foreign(beginning: bytes, file: Path) -> None:
    """Raise CheckpointError naming the kind of a file that begins like another format; return for any other."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what, hint in _KINDS:
        if beginning.startswith(signature) or text.startswith(signature):
            raise CheckpointError(f"{what}, named .safetensors", where=str(file), hint=hint)
