"""The TVM backend."""
