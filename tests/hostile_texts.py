"""Texts that nobody expects and that are texts all the same."""

from __future__ import annotations

HOSTILE = {
    "NUL bytes": "a\0b\0",
    "lone surrogates": "\ud83d and \udc00",
    "emoji": "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}" * 5,
    "right to left": "\N{ARABIC LETTER BEH}\N{RIGHT-TO-LEFT MARK}" * 10,
    "controls": "".join(map(chr, range(32))),
    "special tokens": "[CLS][SEP][PAD]",
    "only spaces": "  \t\n ",
}
