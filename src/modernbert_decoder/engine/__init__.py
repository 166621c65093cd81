"""The inference engine: text in, text out, on ONNX Runtime, without PyTorch."""
