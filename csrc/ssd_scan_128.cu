// The SSD scan with 128 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_128(const Params& p, void* stream) { return launch_states<128>(p, stream); }
