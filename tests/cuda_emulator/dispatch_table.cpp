// Prints what csrc/cuda/dispatch.h chooses: a line "kernel: reason" for every line of eight numbers on standard input
// (cell, dtype, batch, hidden, directions, projected, backward, shared bytes).
#include <iostream>

#include "cuda/launch.h"

int main() {
  const char* names[] = {"step", "pointwise", "persistent", "tensor", "cluster"};
  int64_t cell, dtype, batch, hidden, directions, projected, backward, shared;
  while (std::cin >> cell >> dtype >> batch >> hidden >> directions >> projected >> backward >> shared) {
    const RnnExtChoice choice = rnn_ext_cuda_choose(
        static_cast<RnnExtCell>(cell), static_cast<RnnExtDtype>(dtype), batch, hidden, static_cast<int32_t>(directions),
        static_cast<int32_t>(projected), static_cast<int32_t>(backward), shared);
    std::cout << names[choice.kernel] << ": " << choice.reason << '\n';
  }
}
