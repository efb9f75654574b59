"""The dialect on NVIDIA GPUs: TIR kernels with explicit threads, compiled ahead to cubins (docs/cuda.md)."""
