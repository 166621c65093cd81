"""How good a model is: perplexity of files, and tasks of lm-evaluation-harness, both on the engine."""
