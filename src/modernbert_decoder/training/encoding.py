"""Documents to token ids for training: [CLS] in front, [SEP] behind, special tokens in a text plain text.

Knows nothing of files or sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.documents import Document
from modernbert_decoder.training.sequences import Ids


class DocumentEncoder:
    """Encodes documents with the tokenizer that the model will use."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, cls_token_id: int, sep_token_id: int) -> None:
        """Works on a copy of the tokenizer."""
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Nobody who writes "[SEP]" into a web page shall end a document of the training data.
        self._tokenizer.encode_special_tokens = True
        self._num_ids = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._cls, self._sep = cls_token_id, sep_token_id

    def __call__(self, documents: Sequence[Document]) -> list[Ids]:
        """One array per document.

        Raises:
            InputError: ids that the tokenizer does not have.
        """
        texts = [encodable(document) for document in documents if isinstance(document, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ())
        return [
            self._framed(next(encoded).ids if isinstance(document, str) else self._checked(document))
            for document in documents
        ]

    def _framed(self, ids: Sequence[int]) -> Ids:
        has_cls = bool(ids) and ids[0] == self._cls
        has_sep = bool(ids) and ids[-1] == self._sep
        return np.array([*[self._cls] * (not has_cls), *ids, *[self._sep] * (not has_sep)], np.int32)

    def _checked(self, ids: list[int]) -> list[int]:
        if min(ids) < 0 or max(ids) >= self._num_ids:
            wrong = max(ids) if min(ids) >= 0 else min(ids)
            raise InputError(
                f"a document has the token id {wrong}, but the tokenizer has "
                f"ids 0 to {self._num_ids - 1}; name the tokenizer it was made with in tokenizer.source"
            )
        return ids


def encodable(text: str) -> str:
    """Lone surrogates, which are not text, are read as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
