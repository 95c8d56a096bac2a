// An op for each entry of what vmap maps.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rnn_ext::ops {

/// Of each argument the dimension that has the entries; of a list that of each of its tensors.
using MappedDims = std::vector<std::vector<std::optional<int64_t>>>;

/// Calls rnn_ext::`name` for each of `count` entries of the arguments and stacks what the calls return. `below`: in a
/// rule of torch.func's vmap, whose level all calls leave together.
pybind11::object call_each(const std::string& name, int64_t count, const MappedDims& dims, bool below,
                           const pybind11::args& arguments);

}  // namespace rnn_ext::ops
