"""One attention node by itself, in the forms that ONNX Runtime has for it."""
