"""The benchmark suite: the engine and its peers, measured side by side in one interleaved run.

Start it with `python benchmarks/run.py`. Peers run as worker processes (see `protocol.py`) in their own
interpreters, so modules named `*_peer.py` import nothing but the standard library, numpy and their peer.
"""
