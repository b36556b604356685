// The SSD scan with 64 states a channel.
#include "ssd_scan.cuh"

int quamba::ssd::launch_64(const Params& p, bool output, void* stream) { return launch_states<64>(p, output, stream); }
