"""The graph of an architecture, built once and kept in the cache folder.

Building needs the `onnx` package, which takes longer to import than a small model needs for its first token:
a start that finds its graph here does without it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from modernbert_decoder import quantization
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.atomic_files import WritingError, new_file
from modernbert_decoder.checkpoint import cache_folder
from modernbert_decoder.engine import weights
from modernbert_decoder.quantization import QuantizationScheme

_DIGEST_BYTES: Final = 32


def cached_graph(
    architecture: DecoderArchitecture, scheme: QuantizationScheme, *, num_positions: int
) -> bytes:
    """What `build_graph` returns for these arguments, from the cache folder where it is there.

    A cache folder that cannot be written only costs the time to build the graph.
    """
    path = _path(architecture, scheme, num_positions)
    graph = _read(path)
    if graph is not None:
        return graph
    from modernbert_decoder.engine.graph import build_graph

    graph = build_graph(architecture, scheme, num_positions=num_positions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(hashlib.sha256(graph).digest() + graph)
    except (WritingError, OSError):
        pass
    return graph


def _read(path: Path) -> bytes | None:
    """The graph in a file that starts with its digest; None if it is not there or not whole."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    digest, graph = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return graph if hashlib.sha256(graph).digest() == digest else None


def _path(architecture: DecoderArchitecture, scheme: QuantizationScheme, num_positions: int) -> Path:
    """A name that changes with anything the graph depends on, the code that builds it included."""
    key = hashlib.sha256()
    for source in (Path(__file__).with_name("graph.py"), Path(weights.__file__), Path(quantization.__file__)):
        key.update(source.read_bytes())
    key.update(json.dumps([scheme.to_dict(), num_positions], sort_keys=True).encode())
    key.update(repr(architecture).encode())
    return cache_folder() / "graphs" / f"{key.hexdigest()[:32]}.onnx"
