"""Training, classifying, prefilling and generating: our PyTorch classes side by side with upstream's."""
