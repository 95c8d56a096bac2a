"""Runs the CUDA kernels of csrc/cuda on the CPU: the emulator, its builds, and a command line for any shape."""
