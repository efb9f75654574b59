"""TIR kernels for the CPU, one file per operator family, shared by the ONNX operator library and the TVM backend."""
