// Forward of a layer and of a stack of layers: the scans of forward.inl, shared out among threads.

/// Whether a second thread computes the input gates of one sequence, ahead of the one that runs its steps (measured
/// with two threads on Zen 4: 17 to 25 % less time for GRUs and LSTMs of 32 to 128 units and as many inputs).
template <class Cell, class S>
bool shares_inputs(const ForwardArgs<S>& args, const Executor& executor) {
  // Multiply-adds for each thread that is called together. A third of them gains 5 us, and now and then loses
  // milliseconds, where others keep the second thread waiting for a processor.
  constexpr double kWorthwhile = 7.5e5;
  constexpr int64_t kLeastChunks = 3;
  const Sizes& s = args.sizes;
  const double work = double(Cell::kGates) * double(s.hidden) * double(s.input) * double(args.layout.steps);
  return executor.run_team && executor.waits_actively && executor.threads >= 2 * s.directions &&
         work >= kWorthwhile * executor.threads &&
         args.layout.steps >= kLeastChunks * SharedChunks<Compute<S>>::kSteps && has_plain_steps(args.layout, s);
}

template <class Cell, class S>
void share_inputs(const ForwardArgs<S>& args, const ForwardWeights<Cell, S>* const* weights, const Executor& executor) {
  using Scan = ForwardScan<Cell, S>;
  struct Direction {
    Direction(const ForwardArgs<S>& args, const ForwardWeights<Cell, S>& weights, int d)
        : states(args, d, whole_batch(args.layout)),
          chunks(Scan::keeps(args) ? 0 : Cell::kGates * args.sizes.padded()),
          steps(args, weights, d, whole_batch(args.layout), states, alone, 0, 1, &chunks),
          inputs(args, weights, d, whole_batch(args.layout), states, alone, 0, 1, &chunks) {}
    Team alone;
    ForwardStates<S> states;
    SharedChunks<Compute<S>> chunks;
    Scan steps, inputs;
  };
  const int count = args.sizes.directions;
  Several<Direction> directions(count);
  for (int d = 0; d < count; ++d) directions[d] = new Direction(args, *weights[d], d);
  run_together(executor, 2 * count, 2 * count, [&](int i) {  // which takes no memory
    i < count ? directions[i]->steps.run() : directions[i - count]->inputs.run_ahead();
  });
}

/// Calls scan(direction, slice, states, team, member, members) for all shares of a layer: slices one after another or
/// at the same time, members of a team at the same time.
template <class S, class Scan>
void run_shares(const ForwardArgs<S>& args, const Shares& shares, const Executor& executor, const Scan& scan) {
  const int directions = args.sizes.directions;
  if (shares.members == 1) {
    const Slices slices(args.layout, shares.slices);
    return parallel(executor, directions * slices.size(), [&](int64_t task) {
      const int d = int(task / slices.size());
      const Slice slice = slices[task % slices.size()];
      ForwardStates<S> states(args, d, slice);
      Team alone;
      scan(d, slice, states, alone, 0, 1);
    });
  }
  const Slice whole = whole_batch(args.layout);
  Several<ForwardStates<S>> states(directions);
  Team teams[2];
  for (int d = 0; d < directions; ++d) states[d] = new ForwardStates<S>(args, d, whole);
  run_teams(executor, directions, shares.members, [&](int d, int member, int actual) {
    teams[d].run([&] { scan(d, whole, *states[d], teams[d], member, actual); });
  });
}

template <class Cell, class S>
void forward(const ForwardArgs<S>& args, const Executor& executor) {
  const int directions = args.sizes.directions;
  using Packed = ForwardWeights<cells::Plain<Cell>, S>;
  const bool pack = uses_packed_weights<S>(args.sizes, args.layout);
  // A product of one timestep is the only one of its thread that reads the weights. (A tail has no panel of its own.)
  const bool panels = args.layout.steps == 1 && !has_tail<Compute<S>>(Cell::kGates, args.sizes.hidden);
  const Packing packing = !pack ? Packing::kNone : panels ? Packing::kPanels : Packing::kWhole;
  Several<Packed> own(directions);
  const Packed* weights[2] = {};
  const Executor packs = directions == 1 ? executor : Executor();
  parallel(executor, directions, [&](int64_t d) {
    const bool given = pack && args.packed[d];
    if (!given) own[d] = new Packed(args.weights[d], args.sizes, packing, packs);
    weights[d] = given ? static_cast<const Packed*>(args.packed[d]) : own[d];
  });
  const Shares shares = share_out(args.layout, args.sizes, Cell::kGates, sizeof(S), executor, !cells::kIsNormed<Cell>,
                                  weights[0]->packing == Packing::kWhole);
  const auto scan = [&](int d, Slice slice, ForwardStates<S>& states, Team& team, int member, int members) {
    ForwardScan<Cell, S>(args, *weights[d], d, slice, states, team, member, members).run();
  };
  if constexpr (!cells::kIsVariant<Cell>) {
    if (shares.members == 1 && pack && shares_inputs<Cell>(args, executor))
      return share_inputs<Cell>(args, weights, executor);
  }
  run_shares<S>(args, shares, executor, scan);
}

/// One layer of a stack, ready to run.
template <class Cell, class S>
struct StackLayer {
  using Packed = ForwardWeights<Cell, S>;
  explicit StackLayer(const ForwardArgs<S>& args)
      : own(args.packed[0] ? nullptr : new Packed(args.weights[0], args.sizes, packing(args), Executor())),
        states(args, 0, whole_batch(args.layout)),
        scan(args, args.packed[0] ? static_cast<const Packed&>(*args.packed[0]) : *own, 0, whole_batch(args.layout),
             states, alone, 0, 1) {}
  static Packing packing(const ForwardArgs<S>& args) {
    return uses_packed_weights<S>(args.sizes, args.layout) ? Packing::kWhole : Packing::kNone;
  }
  const std::unique_ptr<Packed> own;
  ForwardStates<S> states;
  Team alone;
  ForwardScan<Cell, S> scan;
};

template <class Cell, class S>
void forward_stack(const ForwardArgs<S>* args, int count, const Executor& executor) {
  Several<StackLayer<Cell, S>> layers(count);
  for (int k = 0; k < count; ++k) layers[k] = new StackLayer<Cell, S>(args[k]);
  run_together(executor, int(smaller(executor.threads, count)), count,
               [&](int k) { layers[k]->scan.run(); });  // which takes no memory
}
