// Prints what csrc/cuda/dispatch.h chooses: a line "kernel: reason" for every line of ten numbers on standard input
// (cell, dtype, length, batch, hidden, directions, projected, backward, shared bytes, multiprocessors).
#include <iostream>

#include "cuda/launch.h"

int main() {
  const char* names[] = {"step", "pointwise", "persistent", "tensor", "grid"};
  int64_t cell, dtype, length, batch, hidden, directions, projected, backward, shared, multiprocessors;
  while (std::cin >> cell >> dtype >> length >> batch >> hidden >> directions >> projected >> backward >> shared >>
         multiprocessors) {
    const RnnExtChoice choice =
        rnn_ext_cuda_choose(static_cast<RnnExtCell>(cell), static_cast<RnnExtDtype>(dtype), length, batch, hidden,
                            static_cast<int32_t>(directions), static_cast<int32_t>(projected),
                            static_cast<int32_t>(backward), shared, multiprocessors);
    std::cout << names[choice.kernel] << ": " << choice.reason << '\n';
  }
}
