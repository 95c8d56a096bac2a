// Prints what csrc/cuda/dispatch.h chooses: a line "kernel: reason", and what there is to remark, for every line of
// numbers on standard input, the members of RnnExtQuestion in their order.
#include <iostream>

#include "cuda/launch.h"

template <class T>
bool read(T& to) {
  int64_t number;
  if (!(std::cin >> number)) return false;
  to = static_cast<T>(number);
  return true;
}

int main() {
  const char* names[] = {"step", "pointwise", "persistent", "tensor", "cluster", "grid"};
  RnnExtQuestion q;
  while (read(q.cell) && read(q.dtype) && read(q.variant) && read(q.length) && read(q.batch) && read(q.hidden) &&
         read(q.directions) && read(q.projected) && read(q.backward) && read(q.allow_tf32) && read(q.shared_bytes) &&
         read(q.multiprocessors)) {
    const RnnExtChoice choice = rnn_ext_cuda_choose(&q);
    RnnExtError remark{};
    std::cout << names[choice.kernel] << ": " << choice.reason;
    if (rnn_ext_cuda_cluster_remark(&q, &remark)) std::cout << "; " << remark.message;
    std::cout << '\n';
  }
}
