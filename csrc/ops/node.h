// Nodes of autograd's graph, in any version of torch.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace rnn_ext::ops {

// A shared_ptr or, in newer torch, an intrusive_ptr.
using NodePtr = decltype(std::declval<torch::autograd::Node&>().getptr());

template <class T, class... Args>
auto make_node(Args&&... args) {
  using torch::autograd::Node;
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    // torch's deleter frees a long chain of nodes one after the other: by default each would free the next within its
    // own destructor, until the stack overflows.
    return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

}  // namespace rnn_ext::ops
