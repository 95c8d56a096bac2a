// Memory of the kernels.

/// Scratch memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, bool zero = false) {
    const size_t bytes = size_t(size) * sizeof(T);
    data_ = bytes ? static_cast<T*>(take_memory(bytes)) : nullptr;
    if (zero && bytes) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { give_memory(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

/// Some of something, each to be made with new when it is its turn.
template <class Item>
class Several {
 public:
  explicit Several(int64_t count) : count_(count), items_(count, true) {}
  ~Several() {
    for (int64_t i = 0; i < count_; ++i) delete items_.get()[i];
  }
  Several(const Several&) = delete;
  Several& operator=(const Several&) = delete;
  Item*& operator[](int64_t i) const { return items_.get()[i]; }
  int64_t size() const { return count_; }

 private:
  const int64_t count_;
  Buffer<Item*> items_;
};
