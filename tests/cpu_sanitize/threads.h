// How csrc/cpu deals out its work to threads, and that they get the bits of one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "run.h"

namespace cpu_sanitize {

inline std::atomic<int64_t> next_task;

inline void by_four_threads(int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  next_task = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([=] {
      for (int64_t task; (task = next_task++) < tasks;) fn(context, task);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline void team(int members, void (*fn)(void*, int, int), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < members; ++i) threads.emplace_back(fn, context, i, members);
  for (std::thread& thread : threads) thread.join();
}

/// Everything that a stack of layers writes: one layer after the other or, by several threads, all at the same time.
template <class S>
Results run_stack(const Config& config, int layers, int threads) {
  Random random{uint64_t(layers)};
  const Steps steps(config, random);
  const Layout& layout = steps.layout;
  const int64_t N = config.batch, H = config.hidden, G = config.gates();
  const Sizes first{config.input, H, config.proj, 1};
  const int64_t out = first.output();
  const int64_t positions = config.form == Config::kPacked ? layout.rows : config.steps * N;
  const Array<S> input(positions * config.input, random, 1);
  const std::unique_ptr<bool[]> resets(new bool[size_t(positions)]);
  for (int64_t i = 0; i < positions; ++i) resets[size_t(i)] = random.below(4) == 0;
  std::vector<Array<S>> weights, outputs, h_n, c_n;
  std::vector<ForwardArgs<S>> args;
  for (int k = 0; k < layers; ++k) {
    Sizes sizes = first;
    if (k > 0) sizes.input = out;
    for (int64_t size : {G * H * sizes.input, G * H * out, G * H, G * H, config.proj * H})
      weights.emplace_back(size, random, 1 / std::sqrt(double(H)));
    outputs.emplace_back(positions * out);
    h_n.emplace_back(N * out);
    c_n.emplace_back(config.has_cell() ? N * H : 0);
  }
  for (int k = 0; k < layers; ++k) {
    ForwardArgs<S> layer;
    layer.cell = config.cell;
    layer.sizes = first;
    if (k > 0) layer.sizes.input = out;
    layer.layout = layout;
    layer.input = sequence<const S>(k > 0 ? outputs[size_t(k - 1)] : input, config, layer.sizes.input);
    if (config.resets) layer.resets = {resets.get(), N, 1};
    const Array<S>* w = &weights[size_t(5 * k)];
    layer.weights[0] = {w[0].begin(), w[1].begin(), w[2].begin(), w[3].begin(), config.proj ? w[4].begin() : nullptr};
    layer.output = sequence<S>(outputs[size_t(k)], config, out);
    layer.h_n = h_n[size_t(k)].begin();
    layer.c_n = config.has_cell() ? c_n[size_t(k)].begin() : nullptr;
    args.push_back(layer);
  }
  if (threads > 1) {
    stack_forward(args.data(), layers, Executor{threads, by_four_threads, team});
  } else {
    for (const ForwardArgs<S>& layer : args) layer_forward(layer, Executor{});
  }
  Results results;
  for (int k = 0; k < layers; ++k) {
    results.add(outputs[size_t(k)], "output", config, layout, out);
    results.add(h_n[size_t(k)], "h_n");
    results.add(c_n[size_t(k)], "c_n");
  }
  return results;
}

inline void stacks() {
  for (int kind = 0; kind < 5; ++kind) {
    const CellKind cell = kind < 4 ? CellKind(kind) : CellKind::kLstm;
    // Of one timestep: the weights as they are. Of one sequence: the input gates ahead of the steps.
    for (const auto& [length, batch] : {std::pair<int64_t, int64_t>{1, 3}, {40, 3}, {53, 1}}) {
      const bool lengths = kind % 2 == 0, packed = kind == 1;
      const int64_t hidden = batch == 1 ? 67 : 19;
      Config config{cell,    length,
                    batch,   21,
                    hidden,  kind == 4 ? 11 : 0,
                    1,       packed ? Config::kPacked : Config::Form(0),
                    true,    lengths,
                    !packed, false,
                    false,   0};
      for (int layers : {2, 3, 5}) {
        const Results alone = run_stack<float>(config, layers, 1);
        if (!alone.problem.empty()) fail(config, alone.problem.c_str());
        for (int threads : {2, 4}) {
          if (run_stack<float>(config, layers, threads).values != alone.values)
            fail(config, "layers at the same time give other bits than one after the other");
        }
      }
    }
  }
}

/// A team that gets 2, 3, 1 and again 2 of the threads it wishes for, in turn.
inline void team_in_turn(int members, void (*fn)(void*, int, int), void* context) {
  static int turn = 0;
  constexpr int kGranted[] = {2, 3, 1, 2};
  team(std::min(members, kGranted[turn++ % 4]), fn, context);
}

inline int most_members;

inline void count_members(int members, void (*fn)(void*, int, int), void* context) {
  most_members = std::max(most_members, members);
  team(members, fn, context);
}

const std::thread::id kMainThread = std::this_thread::get_id();
inline bool asked_in_a_task;

inline bool far_threads() {
  asked_in_a_task |= std::this_thread::get_id() != kMainThread;
  return true;
}

/// Threads share the units of a layer only where that leaves none of them without work that slices of the batch have,
/// nor makes them wait for each other for longer than they compute. How far they are nobody asks who is one of them.
inline void all_threads_work() {
  struct {
    int64_t steps, batch, hidden;
    int threads, members;
    bool are_far;
  } const cases[] = {{1, 600, 64, 8, 0, false}, {2, 40, 305, 2, 0, false}, {2, 31, 305, 2, 2, false},
                     {1, 7, 700, 8, 8, false},  {40, 3, 100, 2, 2, false}, {40, 3, 100, 2, 0, true},
                     {40, 3, 130, 2, 2, true},  {20, 40, 100, 2, 0, true}};
  for (const auto& [steps, batch, hidden, threads, members, are_far] : cases) {
    Config config{CellKind::kLstm,    steps, batch, 9,     hidden, 0,     1,
                  Config::kTimeMajor, true,  false, false, true,   false, 0xffff};
    most_members = 0;
    run<float>(config, Executor{threads, by_four_threads, count_members, false, are_far ? far_threads : nullptr});
    if (most_members != members) fail(config, "units are shared by " + std::to_string(most_members) + " threads");
    if (asked_in_a_task) fail(config, "a task asks other threads how far they are");
  }
}

/// Layers whose units threads share, as many as members and fewer: one sequence, for several chunks of backward; one
/// timestep, whose weights are read as they lie or packed as they are read; large weights.
template <class S>
void shared_units() {
  struct Size {
    int64_t steps, batch, input, hidden;
  };
  // Hardly more than threads are woken for: of one gate, of three and four.
  constexpr Size kOneGate[] = {{400, 1, 3, 258}, {1, 1, 700, 720}, {1, 7, 700, 720}, {1, 40, 270, 280}, {4, 3, 8, 660}};
  constexpr Size kGates[] = {{60, 1, 3, 258}, {1, 1, 350, 360}, {1, 7, 350, 360}, {1, 40, 135, 140}, {4, 3, 8, 340}};
  for (const CellKind cell : {CellKind::kRnnTanh, CellKind::kGru, CellKind::kLstm}) {
    for (const auto& [steps, batch, input, hidden] : cell == CellKind::kRnnTanh ? kOneGate : kGates) {
      const int directions = cell == CellKind::kGru ? 2 : 1;
      Config config{cell, steps, batch, input, hidden, 0,     directions, Config::kTimeMajor,
                    true, false, false, true,  false,  0xffff};
      config.cells = config.has_cell();
      const Results alone = run<S>(config, Executor{});
      if (alone.values.empty()) continue;  // which are not computed
      most_members = 0;
      for (int members : {2, 4}) {
        if (run<S>(config, Executor{members, by_four_threads, count_members}).values != alone.values)
          fail(config, "threads that share the units give other bits than one");
      }
      if (run<S>(config, Executor{4, by_four_threads, team_in_turn}).values != alone.values)
        fail(config, "fewer threads than were wished for give other bits than one");
      // Where pairs of bfloat16 are multiplied, other rules decide how one timestep is shared.
      const bool multiplied = std::is_same_v<S, BFloat16> && computes_bfloat16();
      if (most_members < 2 && !multiplied) fail(config, "no threads share the units");
    }
  }
}

inline int teams;

inline void count_teams(int members, void (*fn)(void*, int, int), void* context) {
  ++teams;
  team_in_turn(members, fn, context);
}

/// One sequence whose input gates a second thread computes ahead of its steps: as far as it likes where they are kept,
/// else as far as there is room. A tail, an odd number of inputs, a last chunk that is no whole one; so many steps that
/// threads are woken for bfloat16 by tiles, too.
template <class S>
void shared_inputs() {
  for (const CellKind cell : {CellKind::kRnnTanh, CellKind::kGru, CellKind::kLstm}) {
    const int directions = cell == CellKind::kGru ? 2 : 1;
    Config config{cell, 1203, 1, 61, 67, 0, directions, Config::kTimeMajor, true, false, false, true, false, 0xffff};
    config.cells = config.has_cell();
    const Results alone = run<S>(config, Executor{});
    if (alone.values.empty()) continue;  // which are not computed
    for (const auto by : {team, count_teams, count_teams}) {
      teams = 0;
      if (run<S>(config, Executor{4, by_four_threads, by, true}).values != alone.values)
        fail(config, "a thread that computes input gates for another makes other bits");
      if (by == count_teams && teams == 0) fail(config, "no thread computes input gates for another");
    }
  }
}

/// Products of so many inputs that these are multiplied piece by piece, for more tiles of rows than go through a piece
/// together.
inline void deep_products() {
  const Config config{CellKind::kRnnTanh, 2,    200,   2100,  100,  0,     1,
                      Config::kTimeMajor, true, false, false, true, false, 0xffff};
  run<float>(config, Executor{});
}

/// Sequences of all lengths are dealt out to slices whole and in order, and none has much more to do than another.
inline void slices() {
  Random random{7};
  Config config{CellKind::kLstm, 0, 0, 1, 1, 0, 1, Config::kTimeMajor, true, true, false, true, false, 0};
  for (const auto& [steps, batch] : {std::pair<int64_t, int64_t>{1, 3}, {200, 5}, {30, 40}, {200, 40}, {90, 300}}) {
    config.steps = steps;
    config.batch = batch;
    for (int64_t count = 1; count <= 9; ++count) {
      const Steps lengths(config, random);
      std::vector<int64_t> ends(static_cast<size_t>(count));
      deal_out(lengths.layout, count, ends.data());
      int64_t first = 0, most = 0;
      for (const int64_t end : ends) {
        if (end < first || (end == first && count <= batch)) fail(config, "a slice of a batch has no entry");
        int64_t rows = 0;
        for (const int64_t alive : lengths.sizes) rows += std::clamp<int64_t>(alive - first, 0, end - first);
        most = std::max(most, rows);
        first = end;
      }
      if (first != batch) fail(config, "slices leave entries of a batch out");
      if (most > lengths.rows / count + 2 * steps) fail(config, "a slice has more to do than others");
    }
  }
}

/// Backward of a batch in two or four parts, by fewer threads, as many and more; all that is wanted, and some of it.
template <class S>
void batch_parts() {
  for (const CellKind cell : {CellKind::kRnnTanh, CellKind::kGru, CellKind::kLstm}) {
    const bool by_batch = cell == CellKind::kGru;
    const Config::Form dense = by_batch ? Config::kBatchMajor : Config::kTimeMajor;
    for (const unsigned wanted : {0xffffu, 0x5a5au, 0xa5a5u}) {
      const bool one_gate = cell == CellKind::kRnnTanh;
      const int64_t batch = one_gate ? 25 : 50, input = one_gate ? 33 : 17, hidden = one_gate ? 48 : 27;
      Config config{cell,  34, batch, input, hidden, 0, 1, dense, true, false, by_batch, true, cell == CellKind::kLstm,
                    wanted};
      for (const bool lengths : {false, true}) {
        config.lengths = lengths;
        config.batch = lengths ? 2 * batch + 6 : batch;  // as many rows
        config.form = lengths && wanted == 0xffff ? Config::kPacked : dense;
        const Results alone = run<S>(config, Executor{});
        for (int threads : {2, 4, 5}) {
          if (run<S>(config, Executor{threads, by_four_threads, team}).values != alone.values)
            fail(config, "parts of a batch have other bits by several threads");
        }
      }
    }
  }
}

template <class S>
void four_threads(const Config& config, const char* dtype) {
  if (run<S>(config, Executor{}).values != run<S>(config, Executor{4, by_four_threads}).values)
    fail(config, std::string("four threads give other bits than one in ") + dtype);
}

inline int threads() {
  widen_always(true);
  stacks();
  slices();
  all_threads_work();
  shared_units<float>();
  shared_units<BFloat16>();
  shared_units<Float16>();
  shared_inputs<float>();
  shared_inputs<BFloat16>();
  shared_inputs<Float16>();
  batch_parts<float>();
  batch_parts<BFloat16>();
  deep_products();
  for (int kind = 0; kind < 5; ++kind) {
    for (int directions : {1, 2}) {
      const CellKind cell = kind < 4 ? CellKind(kind) : CellKind::kLstm;
      const int form = kind % 3;
      const bool one_gate = kind < 2;
      Config config{cell,
                    12,
                    67,
                    one_gate ? 61 : 37,
                    one_gate ? 147 : 83,
                    kind == 4 ? 41 : 0,
                    directions,
                    Config::Form(form),
                    true,
                    form != 2,
                    form != 2,
                    true,
                    cell == CellKind::kLstm,
                    0xffff};
      for (int variant = 0; variant < (cell == CellKind::kLstm ? 3 : 2); ++variant) {
        config.variant = Variant(variant);
        config.masks = variant ? 7 : 0;
        four_threads<float>(config, "float32");
        if (variant) continue;
        four_threads<BFloat16>(config, "bfloat16");
        four_threads<Float16>(config, "float16");
      }
    }
  }
  std::printf("10 configurations\n");
  return 0;
}

}  // namespace cpu_sanitize
