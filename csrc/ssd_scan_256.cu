// The SSD scan with 256 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_256(const Params& p, bool output, void* stream) { return launch_states<256>(p, output, stream); }
