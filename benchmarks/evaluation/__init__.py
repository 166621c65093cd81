"""The engine in lm-evaluation-harness against the harness's own `hf` model, on the same local tasks."""
