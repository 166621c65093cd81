"""The Ettin recipe on Hugging Face Trainer and accelerate: from raw text to a checkpoint, one command a step.

Needs the extra `train`. This room knows the floor and the PyTorch classes, and never the engine. What others
have written well (the loop, sharding, the optimizer, reading formats) is theirs; here are the recipe, its
schedules in tokens, the order of the data and what must survive a kill.
"""
