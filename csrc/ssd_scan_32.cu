// The SSD scan with 16 and 32 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_32(const Params& p, void* stream) {
  return p.a.N == 16 ? launch_states<16>(p, stream) : launch_states<32>(p, stream);
}
