"""Documents per second: classifying many texts with the engine and with transformers' own pipeline."""
