"""Servers under load: ours, llama.cpp's and transformers', through the same client."""
