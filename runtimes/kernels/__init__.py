"""TIR kernels for the CPU, a file per operator family, shared by the ONNX library and the TVM backend."""
