"""`modernbert_decoder.pipeline(...)`: the signatures and output shapes of the Hugging Face documentation.

Four tasks on the engine, without PyTorch, or on the PyTorch wing when it is asked for or the device is a GPU.
This room chooses between the two wings; it computes nothing itself.
"""
