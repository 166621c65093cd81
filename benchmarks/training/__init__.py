"""Useful tokens per second and peak memory of training: `mbd train pretrain` against upstream's class."""
