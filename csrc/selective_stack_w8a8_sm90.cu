#include "selective_stack_launch.cuh"

using quamba::stack::Kind;
namespace selective = quamba::stack::selective;

extern "C" long long quamba_selective_stack_w8a8_workspace(const QuambaSelectiveStack* s) {
  return selective::workspace_of(*s);
}

extern "C" int quamba_selective_stack_w8a8(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW8A8, Kind::kW8A8>(s, false, stream);
}

extern "C" int quamba_selective_stack_w8a8_serves(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW8A8, Kind::kW8A8>(s, true, stream);
}
