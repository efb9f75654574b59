"""The ONNX backend: export, op library, artefacts. Importing it imports nothing heavy."""
