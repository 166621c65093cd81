"""The graph of an architecture, built once and kept in the cache folder.

Building needs the `onnx` package, which takes longer to import than a small model needs for its first token:
a start that finds its graph here does without it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.atomic_files import WritingError, new_file
from modernbert_decoder.checkpoint import cache_folder
from modernbert_decoder.quantization import QuantizationScheme


def cached_graph(
    architecture: DecoderArchitecture, scheme: QuantizationScheme, *, num_positions: int
) -> bytes:
    """What `build_graph` returns for these arguments, from the cache folder where it is there.

    A cache folder that cannot be written only costs the time to build the graph.
    """
    path = _path(architecture, scheme, num_positions)
    if path.is_file():
        return path.read_bytes()
    from modernbert_decoder.engine.graph import build_graph

    graph = build_graph(architecture, scheme, num_positions=num_positions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(graph)
    except (WritingError, OSError):
        pass
    return graph


def _path(architecture: DecoderArchitecture, scheme: QuantizationScheme, num_positions: int) -> Path:
    """A name that changes with anything the graph depends on, the code that builds it included."""
    key = hashlib.sha256(Path(__file__).with_name("graph.py").read_bytes())
    key.update(json.dumps([scheme.to_dict(), num_positions], sort_keys=True).encode())
    key.update(repr(architecture).encode())
    return cache_folder() / "graphs" / f"{key.hexdigest()[:32]}.onnx"
