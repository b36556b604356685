// The SSD scan with 256 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_256(const Params& p, void* stream) { return launch_states<256>(p, stream); }
