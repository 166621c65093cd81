"""Reading pieces of texts with one session, keys and values being the caller's.

This module makes a call of a piece and carries it out; it knows nothing of slots, batches or threads.

Legend: M logit rows, N state rows, V vocabulary or labels, C model width.
"""

from __future__ import annotations

import numpy as np
import onnxruntime

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.engine.calls import Call, Meter, Piece, SelectiveCall
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.selective import ScratchPair


class PieceReader:
    """Feeds pieces to a session, one after another.

    Args:
        session: of the graph.
        architecture: of the model.
        is_selective: whether the graph is a selective one.
        num_positions: of the graph's rotary tables.
        meter: carries out its calls.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        architecture: DecoderArchitecture,
        *,
        is_selective: bool,
        num_positions: int,
        meter: Meter,
    ) -> None:
        self._session = session
        self._architecture = architecture
        self._is_selective = is_selective
        self._num_positions = num_positions
        self._meter = meter
        self._scratch = ScratchPair()

    @property
    def logit_width(self) -> int:
        """The length of a row of logits: labels of a classifier, else the vocabulary."""
        is_classifier = self._architecture.head is Head.SEQUENCE_CLASSIFICATION
        return self._architecture.num_labels if is_classifier else self._architecture.vocab_size

    def empty_logits(self, count: int) -> Float32:
        """Memory for `count` rows of logits."""
        return np.empty((count, self.logit_width), np.float32)

    def read(self, piece: Piece, *, logits: Float32 | None = None) -> tuple[Float32, Float32]:
        """Feeds the texts of a piece their tokens; returns logits (M, V) and states (N, C).

        Args:
            piece: what to read.
            logits: memory for them, (M, V), instead of new one.
        """
        if logits is None:
            logits = self.empty_logits(len(piece.logit_positions))
        states = np.empty((len(piece.state_positions), self._architecture.hidden_size), np.float32)
        bound_logits = None if self._architecture.head is Head.NONE else logits
        if self._is_selective:
            selective = self._selective_call(piece, bound_logits, states)
            self._meter.execute(selective)
            if not piece.is_last:
                selective.keep()
        else:
            call = Call(self._session, piece.layers, shape=piece.shape, logits=bound_logits, states=states)
            call.fill_piece(piece)
            self._meter.execute(call)
        return logits, states

    def _selective_call(self, piece: Piece, logits: Float32 | None, states: Float32) -> SelectiveCall:
        """One that was kept, filled anew, or a new one, which is kept if it can be."""
        kept = piece.kept.get(piece.shape) if piece.asks_for_nothing else None
        if kept is not None:
            kept.refill(piece)
            return kept
        call = SelectiveCall(
            self._session,
            piece,
            new=self._scratch,
            num_positions=self._num_positions,
            logits=logits,
            states=states,
        )
        if piece.asks_for_nothing:
            piece.kept[piece.shape] = call
        return call
