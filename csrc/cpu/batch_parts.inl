// Backward of a batch part by part, so that a thread has all that it needs in its own cache, and waits for no other
// one: it scans its sequences and multiplies what comes of them, for gradients of weights of its own, which are added
// up at the end.

/// A part of a batch as a batch of its own. Its gradients of weights, not rounded, are apart from those of the others.
template <class S>
struct BatchPart {
  using T = Compute<S>;

  BatchPart(const BackwardArgs<S>& whole, int gates, int index, int count)
      : slice(slice_of(whole.layout, index, count)),
        batch_sizes(whole.layout.steps),
        offsets(whole.layout.steps),
        args(whole),
        grads(grad_size(whole, gates)) {
    Layout& layout = args.layout;
    layout.batch = slice.size();
    layout.rows = layout.steps * layout.batch;
    for (int64_t t = 0; t < layout.steps; ++t) {
      batch_sizes.get()[t] = layout.batch;
      offsets.get()[t] = t * layout.batch;
    }
    layout.batch_sizes = batch_sizes.get();
    layout.offsets = offsets.get();

    const int64_t first = slice.first, state = first * whole.sizes.hidden;
    const auto skip_rows = [=](auto& sequence) {
      if (sequence.data) sequence.data += first * sequence.row;
    };
    skip_rows(args.input);
    skip_rows(args.resets);
    skip_rows(args.output);
    skip_rows(args.grad_output);
    skip_rows(args.grad_cells);
    if (args.grad_input.data) {
      const int64_t bytes = args.narrow_grad_input ? 2 : sizeof(T);
      args.grad_input.data = static_cast<char*>(args.grad_input.data) + first * args.grad_input.row * bytes;
    }
    const auto skip_states = [=](auto*& states) {
      if (states) states += state;
    };
    skip_states(args.h_0);
    skip_states(args.c_0);
    skip_states(args.grad_h_n);
    skip_states(args.grad_c_n);
    skip_states(args.grad_h_0);
    skip_states(args.grad_c_0);
    args.saved += first * saved_values(whole.cell, false, whole.variant) * whole.sizes.padded();
    args.saved_offsets = whole.layout.offsets;

    args.narrow_grads = false;
    T* at = grads.get();
    for_each_grad(whole, gates, [&](void* Weights<void>::* weight, int64_t size) {
      args.grad_weights[0].*weight = at;
      at += size;
    });
  }
  BatchPart(const BatchPart&) = delete;
  BatchPart& operator=(const BatchPart&) = delete;

  /// Calls fn(weight, size) for all gradients that are wanted.
  static void for_each_grad(const BackwardArgs<S>& whole, int gates, const auto& fn) {
    const int64_t units = gates * whole.sizes.hidden;
    const auto call = [&](void* Weights<void>::* weight, int64_t width) {
      if (whole.grad_weights[0].*weight) fn(weight, units * width);
    };
    call(&Weights<void>::weight_ih, whole.sizes.input);
    call(&Weights<void>::weight_hh, whole.sizes.hidden);
    call(&Weights<void>::bias_ih, 1);
    call(&Weights<void>::bias_hh, 1);
  }
  static int64_t grad_size(const BackwardArgs<S>& whole, int gates) {
    int64_t sum = 0;
    for_each_grad(whole, gates, [&](void* Weights<void>::*, int64_t size) { sum += size; });
    return sum;
  }

  const Slice slice;
  Buffer<int64_t> batch_sizes, offsets;
  BackwardArgs<S> args;
  Buffer<T> grads;
};

/// Adds the parts' gradients of weights up, in their order.
template <class S>
void add_parts(const BackwardArgs<S>& whole, int gates, const Several<BatchPart<S>>& parts) {
  using T = Compute<S>;
  T* at = parts[0]->grads.get();
  for (int64_t i = 1; i < parts.size(); ++i) add_row(at, parts[i]->grads.get(), BatchPart<S>::grad_size(whole, gates));
  with_storage<T>(whole.grad_storage(), [&]<class To>() {
    BatchPart<S>::for_each_grad(whole, gates, [&](void* Weights<void>::* weight, int64_t size) {
      copy_row(static_cast<To*>(whole.grad_weights[0].*weight), at, size);
      at += size;
    });
  });
}
