#include "stack_launch.cuh"

using quamba::stack::Kind;

extern "C" long long quamba_ssd_stack_w4a16_workspace(const QuambaStack* s) { return quamba::stack::workspace_of(*s); }

extern "C" int quamba_ssd_stack_w4a16(const QuambaStack* s, void* stream) {
  return quamba::stack::launch<Kind::kW4F16, Kind::kW4BF16>(s, false, stream);
}

extern "C" int quamba_ssd_stack_w4a16_serves(const QuambaStack* s, void* stream) {
  return quamba::stack::launch<Kind::kW4F16, Kind::kW4BF16>(s, true, stream);
}
