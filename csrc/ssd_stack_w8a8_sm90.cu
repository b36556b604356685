#include "stack_launch.cuh"

extern "C" long long quamba_ssd_stack_w8a8_workspace(const QuambaStack* s) { return quamba::stack::workspace_of(*s); }

extern "C" int quamba_ssd_stack_w8a8(const QuambaStack* s, void* stream) {
  using namespace quamba::stack;
  return launch<Kind::kW8A8, Kind::kW8A8>(*s, stream);
}
