// The runtime's accesses to a kernel's memory. Compiled WITH the sanitizers, so that a copy the hardware makes on a
// thread's behalf (cp.async, st.async) is checked like the thread's own; the rest of the runtime is not.
#include "memory.h"

namespace emu {

void checked_copy(void* to, const void* from, int bytes, int valid_bytes) {
  auto* out = static_cast<unsigned char*>(to);
  auto* in = static_cast<const unsigned char*>(from);
  for (int i = 0; i < bytes; ++i) out[i] = i < valid_bytes ? in[i] : 0;
}

void checked_poison(void* memory, int bytes) {
  auto* out = static_cast<volatile unsigned char*>(memory);
  for (int i = 0; i < bytes; ++i) out[i] = 0xff;
}

}  // namespace emu
