"""Checkpoints moved between encoder, decoder and trainer formats, bit for bit, without torch."""
