// Functions of the shim that tests call through ctypes.
#include "cuda_runtime.h"

extern "C" void crsam_set_order(unsigned order) { emu::order = order; }

// Returns launches, bytes read and bytes written since the last call.
extern "C" void crsam_take_counters(uint64_t* counters) {
  counters[0] = emu::counters.launches.exchange(0);
  counters[1] = emu::counters.read.exchange(0);
  counters[2] = emu::counters.written.exchange(0);
}
