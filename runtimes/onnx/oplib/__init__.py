"""The op library: custom operators of the domain `ai.isofold` for ONNX Runtime, one shared library."""
