#include "stack_launch.cuh"

using quamba::stack::Kind;

extern "C" long long quamba_ssd_stack_w8a8_workspace(const QuambaStack* s) { return quamba::stack::workspace_of(*s); }

extern "C" int quamba_ssd_stack_w8a8(const QuambaStack* s, void* stream) {
  return quamba::stack::launch<Kind::kW8A8, Kind::kW8A8>(s, false, stream);
}

extern "C" int quamba_ssd_stack_w8a8_serves(const QuambaStack* s, void* stream) {
  return quamba::stack::launch<Kind::kW8A8, Kind::kW8A8>(s, true, stream);
}
