"""Runs the CUDA kernels of csrc/cuda on the CPU: the very same sources, compiled by g++ (or clang++).

emu/                emulator.h says what it models and reports; cuda_builtins.h is the CUDA that kernels write
build.py            builds programs with it: plain, under ASan + UBSan, under TSan
case.py, driver.cpp one layer call, compared with rnn_ext.reference in float64
run.py              the command line: python -m tests.cuda_emulator.run --cell lstm --kernel persistent --backward
bad_kernels.cu      seeded mistakes, each of which must be reported
good_kernels.cu     features used correctly, none of which may be reported
mutate.py           deletes or weakens every synchronisation and bound of csrc/cuda, and lists what nobody notices
dispatch_table.cpp  prints what csrc/cuda/dispatch.h chooses

What it cannot see: weak memory beyond happens-before, the last digits of the GPU's functions, bank conflicts, time.
"""
