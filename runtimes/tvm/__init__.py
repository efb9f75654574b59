"""The TVM backend: programs to Relax, our kernels beside generated ones, one library that TVM's runtime executes."""
