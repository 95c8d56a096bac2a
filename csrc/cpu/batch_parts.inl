// Backward of a batch part by part, so that a thread has all that it needs in its own cache, and waits for no other
// one: it scans its sequences and multiplies what comes of them, for gradients of weights of its own, which are added
// up at the end.

/// Memory for the layout of some entries of a batch.
class SomeEntries {
 public:
  explicit SomeEntries(int64_t steps) : batch_sizes_(steps), offsets_(steps) {}

  /// Of so many, of which alive(t), which does not rise, have step t, up to the last that any has.
  Layout layout(const Layout& whole, int64_t batch, const auto& alive) {
    Layout found;
    found.batch = batch;
    found.batch_sizes = batch_sizes_.get();
    found.offsets = offsets_.get();
    found.packed = whole.packed;
    for (; found.steps < whole.steps; ++found.steps) {
      const int64_t rows = alive(found.steps);
      if (rows == 0) break;
      batch_sizes_.get()[found.steps] = rows;
      offsets_.get()[found.steps] = found.rows;
      found.rows += rows;
    }
    return found;
  }

 private:
  Buffer<int64_t> batch_sizes_, offsets_;
};

/// A part of a batch as a batch of its own. Its gradients of weights, not rounded, are apart from those of the others.
template <class S>
struct BatchPart {
  using T = Compute<S>;

  BatchPart(const BackwardArgs<S>& whole, int gates, Slice slice)
      : entries(whole.layout.steps), args(whole), grads(grad_size(whole, gates)) {
    const Layout& all = whole.layout;
    Layout& layout = args.layout;
    layout = entries.layout(all, slice.size(), [&](int64_t t) { return slice.active(all, t); });
    layout.stored = all.stored_offsets();
    if (all.order) layout.order = all.order + slice.first;

    // An order leads to entries wherever they lie.
    const int64_t rows = all.order && !all.packed ? 0 : slice.first;
    const auto skip_rows = [=](auto& sequence) {
      if (sequence.data) sequence.data += rows * sequence.row;
    };
    skip_rows(args.input);
    skip_rows(args.resets);
    skip_rows(args.output);
    skip_rows(args.grad_output);
    skip_rows(args.grad_cells);
    if (args.grad_input.data) {
      const int64_t bytes = args.narrow_grad_input ? 2 : sizeof(T);
      args.grad_input.data = static_cast<char*>(args.grad_input.data) + rows * args.grad_input.row * bytes;
    }
    const int64_t states = all.order ? 0 : slice.first * whole.sizes.hidden;
    const auto skip_states = [=](auto*& of) {
      if (of) of += states;
    };
    skip_states(args.h_0);
    skip_states(args.c_0);
    skip_states(args.grad_h_n);
    skip_states(args.grad_c_n);
    skip_states(args.grad_h_0);
    skip_states(args.grad_c_0);
    args.saved += slice.first * saved_values(whole.cell, false, whole.variant) * whole.sizes.padded();

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

  SomeEntries entries;
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
