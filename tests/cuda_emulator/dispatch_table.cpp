// Prints what csrc/cuda/dispatch.h chooses: a line "kernel: reason" for every line of nine numbers on standard input
// (cell, dtype, batch, hidden, directions, projected, backward, shared bytes, whether TF32 is allowed).
#include <iostream>

#include "cuda/launch.h"

int main() {
  const char* names[] = {"step", "pointwise", "persistent", "tensor"};
  int64_t cell, dtype, batch, hidden, directions, projected, backward, shared, tf32;
  while (std::cin >> cell >> dtype >> batch >> hidden >> directions >> projected >> backward >> shared >> tf32) {
    const RnnExtChoice choice = rnn_ext_cuda_choose(
        static_cast<RnnExtCell>(cell), static_cast<RnnExtDtype>(dtype), batch, hidden, static_cast<int32_t>(directions),
        static_cast<int32_t>(projected), static_cast<int32_t>(backward), shared, static_cast<int32_t>(tf32));
    std::cout << names[choice.kernel] << ": " << choice.reason << '\n';
  }
}
