"""Backends that lower a program and run the result; they share the kernels of `runtimes.kernels`."""
