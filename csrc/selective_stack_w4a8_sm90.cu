#include "selective_stack_launch.cuh"

using quamba::stack::Kind;
namespace selective = quamba::stack::selective;

extern "C" long long quamba_selective_stack_w4a8_workspace(const QuambaSelectiveStack* s) {
  return selective::workspace_of(*s);
}

extern "C" int quamba_selective_stack_w4a8(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW4A8, Kind::kW4A8>(s, false, stream);
}

extern "C" int quamba_selective_stack_w4a8_serves(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW4A8, Kind::kW4A8>(s, true, stream);
}
