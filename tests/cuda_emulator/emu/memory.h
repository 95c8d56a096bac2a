// What the runtime does to a kernel's memory, under the eyes of the sanitizers.
#pragma once

namespace emu {

void checked_copy(void* to, const void* from, int bytes, int valid_bytes);  // bytes past valid_bytes become zero
void checked_poison(void* memory, int bytes);                               // 0xff..: NaN in every floating type

}  // namespace emu
