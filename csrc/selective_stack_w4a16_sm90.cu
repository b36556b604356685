#include "selective_stack_launch.cuh"

using quamba::stack::Kind;
namespace selective = quamba::stack::selective;

extern "C" long long quamba_selective_stack_w4a16_workspace(const QuambaSelectiveStack* s) {
  return selective::workspace_of(*s);
}

extern "C" int quamba_selective_stack_w4a16(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW4F16, Kind::kW4BF16>(s, false, stream);
}

extern "C" int quamba_selective_stack_w4a16_serves(const QuambaSelectiveStack* s, void* stream) {
  return selective::launch<Kind::kW4F16, Kind::kW4BF16>(s, true, stream);
}
