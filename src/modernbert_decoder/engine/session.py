"""Opening ONNX Runtime sessions: options, weights shared with them, and providers that cannot be used.

This module knows nothing of models, slots or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray

from modernbert_decoder.errors import InputError

_SPIN_MICROSECONDS: Final = "1000"
CPU_PROVIDER: Final = "CPUExecutionProvider"


def shared_value(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """The array's own memory as a runtime value."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def open_session(
    graph: bytes,
    names: list[str],
    arrays: list[NDArray[Any]],
    *,
    threads: int,
    providers: Sequence[str],
) -> onnxruntime.InferenceSession:
    """A session of a graph whose weights are given by name.

    Raises:
        InputError: a provider cannot be used.
    """
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise InputError(
            f"execution provider {missing[0]} is not in this build of ONNX Runtime; "
            f"available: {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The graph is built fused; the extended optimizations would only undo what was measured to be faster.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    # Threads spin from one call to the next, which sampling does not delay for longer than this, and then
    # sleep: an idle session takes no processor. By default they would spin for about 40 ms.
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    options.add_external_initializers(names, [shared_value(array) for array in arrays])
    try:
        # Without the fallback, which prints a notice to standard output and goes on with the CPU.
        session = onnxruntime.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # each provider has exceptions of its own
        if set(providers) <= {CPU_PROVIDER}:
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the model cannot be run with the execution providers {', '.join(providers)}: {first_line}; "
            f"correct their installation, or use {CPU_PROVIDER}"
        ) from error
    unused = [name for name in providers if name not in session.get_providers()]
    if unused:
        raise InputError(
            f"execution provider {unused[0]} is in this build of ONNX Runtime but cannot be started, for "
            f"instance because its device or its libraries are missing; put that right, or use {CPU_PROVIDER}"
        )
    return session
