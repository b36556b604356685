// The SSD scan with 64 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_64(const Params& p, void* stream) { return launch_states<64>(p, stream); }
