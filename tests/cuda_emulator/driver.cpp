// Reads one layer call from a file, runs it through csrc/cuda/launch.h, and writes what the kernels wrote.
//
//   driver REQUEST RESPONSE
//
// Both files: a line of key=value words (request only), then for every array "name bytes\n" and its bytes. An array of
// the request named in lower case is an input; "name?" asks for an output of so many bytes, which starts as NaN. Names
// end in the number of their direction where they belong to one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/step_launch.h"

namespace {

using namespace rnn_ext::cuda;

// Allocated to the byte, so that AddressSanitizer sees the first access beyond.
struct Array {
  std::unique_ptr<char[]> memory;
  size_t bytes = 0;
  bool is_output = false;
};

struct Request {
  std::map<std::string, std::string> words;
  std::map<std::string, Array> arrays;

  int64_t number(const std::string& key) const { return std::stoll(words.at(key)); }
  bool is(const std::string& key, const std::string& value) const { return words.at(key) == value; }
  template <class T = void>
  T* array(const std::string& name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? nullptr : reinterpret_cast<T*>(found->second.memory.get());
  }
};

Request read_request(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Request request;
  std::string line;
  std::getline(file, line);
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    request.words[word.substr(0, equals)] = word.substr(equals + 1);
  }
  while (std::getline(file, line)) {
    std::istringstream header(line);
    std::string name;
    Array array;
    header >> name >> array.bytes;
    array.memory.reset(new char[array.bytes]);
    if (name.back() == '?') {
      name.pop_back();
      array.is_output = true;
      std::memset(array.memory.get(), 0xff, array.bytes);
    } else {
      file.read(array.memory.get(), static_cast<std::streamsize>(array.bytes));
    }
    request.arrays[name] = std::move(array);
  }
  return request;
}

void write_response(const char* path, const Request& request) {
  std::ofstream file(path, std::ios::binary);
  for (const auto& [name, array] : request.arrays) {
    if (!array.is_output) continue;
    file << name << ' ' << array.bytes << '\n';
    file.write(array.memory.get(), static_cast<std::streamsize>(array.bytes));
  }
}

RnnExtSequence sequence_of(const Request& request) {
  RnnExtSequence s{};
  s.length = request.number("length");
  s.batch = request.number("batch");
  s.hidden = request.number("hidden");
  s.time_stride = request.number("time_stride");
  s.batch_stride = request.number("batch_stride");
  s.batch_sizes = request.array<int64_t>("batch_sizes");
  s.row_offsets = request.array<int64_t>("row_offsets");
  s.lengths = request.array<int64_t>("lengths");
  s.resets = request.array<uint8_t>("resets");
  s.resets_time_stride = s.batch;
  s.resets_batch_stride = 1;
  return s;
}

template <class Args>
Args layer_of(const Request& request) {
  Args args{};
  args.cell = static_cast<RnnExtCell>(request.number("cell"));
  args.dtype = static_cast<RnnExtDtype>(request.number("dtype"));
  args.sequence = sequence_of(request);
  args.directions = static_cast<int32_t>(request.number("directions"));
  args.variant = static_cast<RnnExtVariant>(request.number("variant"));
  return args;
}

int64_t gates_of(RnnExtCell cell) { return cell == RNN_EXT_LSTM ? 4 : cell == RNN_EXT_GRU ? 3 : 1; }

// A direction's share of rows that hold both directions.
template <class T>
T* share(T* rows, const char* direction, int64_t width) {
  return rows ? rows + (direction[0] - '0') * width : nullptr;
}

template <class T>
RnnExtMasks masks_of(const Request& request, const std::string& suffix) {
  using A = AccumulatorOf<T>;
  const int64_t hidden = request.number("hidden"), stride = request.number("output_stride");
  RnnExtMasks masks{};
  masks.hidden = request.array("hidden_mask" + suffix);
  masks.zoneout_h = share(request.array<A>("zoneout_h"), suffix.c_str(), hidden);
  masks.zoneout_c = share(request.array<A>("zoneout_c"), suffix.c_str(), hidden);
  masks.zoneout_h_stride = masks.zoneout_c_stride = stride;
  return masks;
}

RnnExtNorm norm_of(const Request& request, const std::string& suffix) {
  RnnExtNorm norm{};
  norm.weight_ih = request.array("weight_norm_ih" + suffix);
  norm.weight_hh = request.array("weight_norm_hh" + suffix);
  norm.weight_c = request.array("weight_norm_c" + suffix);
  norm.bias_c = request.array("bias_norm_c" + suffix);
  norm.bias_hh = request.array("bias_hh" + suffix);
  norm.statistics = request.array("statistics" + suffix);
  norm.scratch = request.array("scratch" + suffix);
  return norm;
}

template <class T>
RnnExtForward forward_of(const Request& request) {
  auto args = layer_of<RnnExtForward>(request);
  for (int i = 0; i < args.directions; ++i) {
    RnnExtForwardDirection& d = args.direction[i];
    const std::string suffix = std::to_string(i);
    const int64_t hidden = args.sequence.hidden, gates = gates_of(args.cell);
    d.reverse = static_cast<int32_t>(request.number("reverse" + suffix));
    d.igates = share(request.array<T>("igates"), suffix.c_str(), gates * hidden);
    d.igates_stride = request.number("igates_stride");
    d.weight_hh = request.array("weight_hh" + suffix);
    d.bias_hh = request.array("bias_hh" + suffix);
    d.h_0 = request.array("h_0" + suffix);
    d.c_0 = request.array("c_0" + suffix);
    d.output = share(request.array<T>("output"), suffix.c_str(), hidden);
    d.output_stride = request.number("output_stride");
    d.h_n = request.array("h_n" + suffix);
    d.c_n = request.array("c_n" + suffix);
    d.saved = request.array("saved" + suffix);
    d.cells = request.array("cells" + suffix);
    d.cell_state = request.array("cell_state" + suffix);
    d.h_state = request.array("h_state" + suffix);
    d.masks = masks_of<T>(request, suffix);
    d.h_masked = request.array("h_masked" + suffix);
    d.norm = norm_of(request, suffix);
  }
  return args;
}

template <class T>
RnnExtBackward backward_of(const Request& request) {
  auto args = layer_of<RnnExtBackward>(request);
  for (int i = 0; i < args.directions; ++i) {
    RnnExtBackwardDirection& d = args.direction[i];
    const std::string suffix = std::to_string(i);
    const int64_t hidden = args.sequence.hidden;
    d.reverse = static_cast<int32_t>(request.number("reverse" + suffix));
    d.weight_hh = request.array("weight_hh" + suffix);
    d.h_0 = request.array("h_0" + suffix);
    d.c_0 = request.array("c_0" + suffix);
    d.output = share(request.array<T>("output"), suffix.c_str(), hidden);
    d.output_stride = request.number("output_stride");
    d.saved = request.array("saved" + suffix);
    d.cells = request.array("cells" + suffix);
    d.doutput = share(request.array<T>("doutput"), suffix.c_str(), hidden);
    d.doutput_stride = request.number("output_stride");
    d.dcells = share(request.array<T>("dcells"), suffix.c_str(), hidden);
    d.dcells_stride = request.number("output_stride");
    d.dh_n = request.array("dh_n" + suffix);
    d.dc_n = request.array("dc_n" + suffix);
    d.dgates = request.array("dgates" + suffix);
    d.dgates_stride = request.number("dgates_stride");
    d.dh_carry = request.array("dh_carry" + suffix);
    d.dc_carry = request.array("dc_carry" + suffix);
    d.dh_0 = request.array("dh_0" + suffix);
    d.dc_0 = request.array("dc_0" + suffix);
    d.masks = masks_of<T>(request, suffix);
    d.norm = norm_of(request, suffix);
  }
  return args;
}

// The product that a library GEMM would leave for the pointwise kernels: one row each, where the other timestep exists.
template <class T>
void forward_product(const RnnExtForward& args, const RnnExtForwardDirection& d, const Moment& before,
                     std::vector<T>& hgates) {
  const RowRules rules = row_rules(args.sequence);
  const int64_t hidden = args.sequence.hidden, columns = gates_of(args.cell) * hidden;
  for (int64_t n = 0; n < args.sequence.batch; ++n) {
    const T* h = d.h_masked ? static_cast<const T*>(d.h_masked) + n * hidden
                 : rules.exists(before, n)
                     ? static_cast<const T*>(d.output) + before.row(n, rules.batch_stride) * d.output_stride
                 : d.h_0 ? static_cast<const T*>(d.h_0) + n * hidden
                         : nullptr;
    for (int64_t j = 0; j < columns; ++j) {
      AccumulatorOf<T> sum = 0;
      for (int64_t k = 0; h && k < hidden; ++k)
        sum += widen(h[k]) * widen(static_cast<const T*>(d.weight_hh)[j * hidden + k]);
      hgates[static_cast<size_t>(n * columns + j)] = narrow<T>(sum);
    }
  }
}

template <class T>
void backward_product(const RnnExtBackward& args, const RnnExtBackwardDirection& d, const Moment& after,
                      std::vector<T>& dh) {
  const RowRules rules = row_rules(args.sequence);
  const int64_t hidden = args.sequence.hidden, gates = gates_of(args.cell);
  for (int64_t n = 0; n < args.sequence.batch; ++n) {
    if (!rules.exists(after, n)) continue;
    const T* dgates = static_cast<const T*>(d.dgates) + after.row(n, rules.batch_stride) * d.dgates_stride;
    for (int64_t j = 0; j < hidden; ++j) {
      AccumulatorOf<T> sum = 0;
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t slot = args.variant == RNN_EXT_LAYER_NORM   ? rnn_ext::cells::LayerNormLstm::hh_slot(g)
                             : args.cell == RNN_EXT_GRU && g == 2 ? 3
                                                                  : g;
        for (int64_t k = 0; k < hidden; ++k) {
          sum += widen(dgates[slot * hidden + k]) *
                 widen(static_cast<const T*>(d.weight_hh)[(g * hidden + k) * hidden + j]);
        }
      }
      dh[static_cast<size_t>(n * hidden + j)] = narrow<T>(sum);
    }
  }
}

template <class T>
int pointwise_forward(RnnExtForward args, RnnExtError* error) {
  for (int64_t step = 0; step < args.sequence.length; ++step) {
    std::vector<T> hgates[2];
    for (int i = 0; i < args.directions; ++i) {
      RnnExtForwardDirection& d = args.direction[i];
      hgates[i].resize(static_cast<size_t>(args.sequence.batch * gates_of(args.cell) * args.sequence.hidden));
      Timeline timeline(args.sequence, d.reverse != 0);
      forward_product<T>(args, d, timeline.at(step - 1), hgates[i]);
      d.hgates = hgates[i].data();
    }
    if (rnn_ext_cuda_step_forward(&args, step, step + 1, nullptr, error)) return 1;
  }
  return 0;
}

template <class T>
int pointwise_backward(RnnExtBackward args, RnnExtError* error) {
  for (int64_t step = 0; step <= args.sequence.length; ++step) {
    std::vector<T> dh[2];
    for (int i = 0; i < args.directions; ++i) {
      RnnExtBackwardDirection& d = args.direction[i];
      dh[i].resize(static_cast<size_t>(args.sequence.batch * args.sequence.hidden));
      Timeline timeline(args.sequence, d.reverse != 0);
      backward_product<T>(args, d, timeline.at(args.sequence.length - step), dh[i]);
      d.dh_recurrent = dh[i].data();
    }
    if (rnn_ext_cuda_step_backward(&args, step, step + 1, nullptr, error)) return 1;
  }
  return 0;
}

// Allocated to the byte, as all arrays here, and zero, as it has to be.
std::unique_ptr<char[]> grid_workspace(const RnnExtForward& args, bool backward) {
  const RnnExtSequence& s = args.sequence;
  const int64_t bytes =
      rnn_ext_cuda_grid_workspace(args.cell, args.dtype, s.batch, s.hidden, args.directions, backward ? 1 : 0);
  return std::make_unique<char[]>(static_cast<size_t>(bytes));
}

template <class T>
int run_request(const Request& request, RnnExtError* error) {
  const RnnExtForward forward = forward_of<T>(request);
  const RnnExtBackward backward = backward_of<T>(request);
  const int64_t length = forward.sequence.length;
  const bool with_backward = request.number("backward") != 0;
  if (request.is("kernel", "step")) {
    if (rnn_ext_cuda_step_forward(&forward, 0, length, nullptr, error)) return 1;
    return with_backward ? rnn_ext_cuda_step_backward(&backward, 0, length + 1, nullptr, error) : 0;
  }
  if (request.is("kernel", "persistent")) {
    if (rnn_ext_cuda_persistent_forward(&forward, nullptr, error)) return 1;
    return with_backward ? rnn_ext_cuda_persistent_backward(&backward, nullptr, error) : 0;
  }
  if (request.is("kernel", "tensor")) {
    if (rnn_ext_cuda_tensor_forward(&forward, nullptr, error)) return 1;
    return with_backward ? rnn_ext_cuda_tensor_backward(&backward, nullptr, error) : 0;
  }
  if (request.is("kernel", "cluster")) {
    if (rnn_ext_cuda_cluster_forward(&forward, nullptr, error)) return 1;
    return with_backward ? rnn_ext_cuda_cluster_backward(&backward, nullptr, error) : 0;
  }
  if (request.is("kernel", "grid")) {
    const int64_t units = request.number("units");
    if (rnn_ext_cuda_grid_forward(&forward, units, grid_workspace(forward, false).get(), nullptr, error)) return 1;
    if (!with_backward) return 0;
    return rnn_ext_cuda_grid_backward(&backward, units, grid_workspace(forward, true).get(), nullptr, error);
  }
  if (request.is("kernel", "pointwise")) {
    if (pointwise_forward<T>(forward, error)) return 1;
    return with_backward ? pointwise_backward<T>(backward, error) : 0;
  }
  std::snprintf(error->message, sizeof error->message, "no kernel is called %s", request.words.at("kernel").c_str());
  return 1;
}

}  // namespace

int main(int, char** argv) {
  const Request request = read_request(argv[1]);
  RnnExtError error{};
  int failed = 1;
  switch (request.number("dtype")) {
    case RNN_EXT_FLOAT32:
      failed = run_request<float>(request, &error);
      break;
    case RNN_EXT_FLOAT64:
      failed = run_request<double>(request, &error);
      break;
    case RNN_EXT_BFLOAT16:
      failed = run_request<bfloat16>(request, &error);
      break;
    case RNN_EXT_FLOAT16:
      failed = run_request<float16>(request, &error);
      break;
  }
  if (failed) {
    std::fprintf(stderr, "launch refused: %s\n", error.message);
    return 2;
  }
  write_response(argv[2], request);
  return 0;
}
