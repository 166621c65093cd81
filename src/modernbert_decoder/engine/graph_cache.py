"""The graph of an architecture, built once and kept in the cache folder.

Building needs the `onnx` package, which takes longer to import than a small model needs for its first token:
a start that finds its graph here does without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from modernbert_decoder import quantization
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.atomic_files import WritingError, new_file
from modernbert_decoder.checkpoint import cache_folder
from modernbert_decoder.engine import weights
from modernbert_decoder.quantization import QuantizationScheme

_DIGEST_BYTES: Final = 32
PROBE_LENGTH: Final = 64


def cached_graph(
    architecture: DecoderArchitecture,
    scheme: QuantizationScheme,
    *,
    num_positions: int,
    is_for_pieces: bool = False,
    is_selective: bool = False,
    num_stepwise: int = 0,
) -> bytes:
    """What `build_graph` returns for these arguments, from the cache folder where it is there.

    A cache folder that cannot be used only costs the time to build the graph.
    """
    levels = 127
    if scheme.body.is_per_row and products_saturate():
        levels = 63

    def build() -> bytes:
        from modernbert_decoder.engine.graph import build_graph

        return build_graph(
            architecture,
            scheme,
            num_positions=num_positions,
            activation_levels=levels,
            is_for_pieces=is_for_pieces,
            is_selective=is_selective,
            num_stepwise=num_stepwise,
        )

    numbers = [num_positions, levels, int(is_for_pieces), int(is_selective), num_stepwise]
    return _cached(_path(architecture, scheme, numbers), build)


def products_saturate() -> bool:
    """Whether this processor's products of unsigned and signed bytes are cut off at 16 bits.

    Those without VNNI instructions add two products in 16 bits. With 7-bit activations they still fit.
    """
    import onnxruntime

    def build() -> bytes:
        from modernbert_decoder.engine.graph import build_probe

        return build_probe(PROBE_LENGTH)

    source = hashlib.sha256(Path(__file__).with_name("graph.py").read_bytes()).hexdigest()
    probe = _cached(cache_folder() / "graphs" / f"probe-{source[:32]}.onnx", build)
    session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
    left = np.full((4, PROBE_LENGTH), 255, np.uint8)
    (product,) = session.run(None, {"left": left})
    return bool((product != PROBE_LENGTH * 255 * 127).any())


def _cached(path: Path, build: Callable[[], bytes]) -> bytes:
    """What a file holds, or else what `build` gives, which is then kept there if it can be."""
    graph = _read(path)
    if graph is not None:
        return graph
    graph = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(hashlib.sha256(graph).digest() + graph)
    except (WritingError, OSError):
        pass
    return graph


def _read(path: Path) -> bytes | None:
    """The graph in a file that starts with its digest; None if it is not there, not whole or not ours to
    read.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, graph = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return graph if hashlib.sha256(graph).digest() == digest else None


def _path(architecture: DecoderArchitecture, scheme: QuantizationScheme, numbers: list[int]) -> Path:
    """A name that changes with anything the graph depends on, the code that builds it included."""
    key = hashlib.sha256()
    for source in (Path(__file__).with_name("graph.py"), Path(weights.__file__), Path(quantization.__file__)):
        key.update(source.read_bytes())
    key.update(json.dumps([scheme.to_dict(), *numbers], sort_keys=True).encode())
    key.update(repr(architecture).encode())
    return cache_folder() / "graphs" / f"{key.hexdigest()[:32]}.onnx"
