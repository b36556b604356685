// The host side of stacks of Mamba1 blocks, as stack_launch.cuh.
#pragma once

#include "selective_stack.cuh"
#include "stack_launch.cuh"

namespace quamba::stack::selective {

constexpr int kMostBlocks = 255;  // that a sum can count, with kMostSum of each

constexpr int kPace = 75;  // percent of a layer's time for its copies: with more of it the smallest ring is too slow

inline int common_of(const QuambaSelectiveStack& s) { return s.R + 2 * kStates; }

inline int64_t workspace_of(const QuambaSelectiveStack& s) {
  return rounded_up(8ll * kCopies * std::min(s.count, kMostLayers) * common_of(s)) + 4ll * (s.mixer.H + s.D) +
         2 * sizeof(unsigned);
}

inline bool aligned(const QuambaSelectiveStackLayer& l) {
  for (const QuambaStackLinear& linear : {l.in, l.x, l.dt, l.out})
    for (const void* p : {linear.w, linear.w_scale, linear.w_multiplier, linear.bias})
      if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  for (const void* p : {static_cast<const void*>(l.conv_state), l.conv_weight, l.conv_bias,
                        static_cast<const void*>(l.conv_weight_scale), static_cast<const void*>(l.conv_in_scale),
                        static_cast<const void*>(l.conv_out_scale), static_cast<const void*>(l.state),
                        static_cast<const void*>(l.state_scale), static_cast<const void*>(l.A),
                        static_cast<const void*>(l.D), static_cast<const void*>(l.z_scale), l.norm_weight})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

// Everything but the pointers; QUAMBA_UNSUPPORTED for what the kernel does not take.
template <Kind KIND, typename State, int TYPE>
int plan(const QuambaSelectiveStack& s, Params& p, int& sms, int& bytes) {
  const QuambaDecode& q = s.mixer;
  const int inner = q.H;
  constexpr bool kCodes = kInteger<KIND>;
  using Made = Mixer<kCodes, State>;
  p.mixer = q, p.eps = s.eps, p.R = s.R;
  if (q.batch != 1 || q.P != 1 || q.N != kStates || q.channels != inner || inner < kRun || inner % kRun || s.D < kRun ||
      s.D % kRun || s.count < 1 || s.R < 4 || s.R % 4 || s.R > kMostRank || q.norm_groups)
    return QUAMBA_UNSUPPORTED;
  if (q.conv_state_type != (kCodes ? QUAMBA_I8 : TYPE) || q.conv_weight_type != q.conv_state_type)
    return QUAMBA_UNSUPPORTED;
  p.norm = {1, s.D / kRun, 1.f / static_cast<float>(s.D)};
  if (!make_rotation(q.block, p.rotation) || p.rotation.base > 20 ||
      (p.rotation.base && (p.rotation.bits < 5 || inner % q.block)))
    return QUAMBA_UNSUPPORTED;
  int most = 0;
  const int status = look_at_device(sms, most);
  if (status != QUAMBA_OK) return status;
  if (sms > kMostBlocks || !describe<KIND>(p.matrix[0], inner, s.D, s.S, sms) ||
      !describe<KIND>(p.matrix[1], s.D, inner, s.S, sms))
    return QUAMBA_UNSUPPORTED;
  p.groups = KIND == Kind::kW8A8 ? 0 : inner / s.S;

  const int channels = most_rows(p.matrix[0], sms);
  if (channels > kMostChannels) return QUAMBA_UNSUPPORTED;
  // octets: an odd number, for the banks
  p.pitch = kInteger<KIND> ? (channels / kOctet | 1) * kOctetBytes<KIND> : most_pieces<KIND>(channels / kOctet) * 16;
  p.dt_at = 0, p.x_at = (channels * s.R + 15) / 16 * 16;
  p.multipliers_at = (p.x_at + common_of(s) * p.pitch + 15) / 16 * 16;
  const int more = p.multipliers_at + (KIND == Kind::kW8A8 ? 0 : 2 * common_of(s) * (kCodes ? 1 : 2));

  p.ahead = kAhead, p.ask_pace = kAskPace, p.pace = kPace;
  return divide<KIND>(p, sms, most, static_cast<int>(sizeof(Between) + offsetof(Made, more)) + more, bytes);
}

// Whether tensors are there where the kernel reads them, and not where it does not.
template <Kind KIND, typename State, int TYPE>
bool complete(const QuambaSelectiveStackLayer& l, const QuambaDecode& q) {
  constexpr bool kCodes = kInteger<KIND>;
  for (const float* scale : {l.conv_in_scale, static_cast<const float*>(l.conv_weight_scale), l.conv_out_scale,
                             l.x_scale, l.B_scale, l.C_scale})
    if ((scale != nullptr) != kCodes) return false;
  if (!l.dt.w || !l.dt.w_scale || l.x.bias || (l.state_scale != nullptr) != (sizeof(State) == 1)) return false;
  return (kCodes || !l.z_scale) && (!l.conv_bias || q.conv_bias_type == TYPE);
}

template <Kind KIND, typename State, int TYPE>
int launch(const QuambaSelectiveStack& s, bool only_plan, cudaStream_t stream) {
  const QuambaDecode& q = s.mixer;
  Params p{};
  int sms = 0, bytes = 0;
  const int status = plan<KIND, State, TYPE>(s, p, sms, bytes);
  if (status != QUAMBA_OK || only_plan) return status;
  if (s.workspace_bytes < workspace_of(s)) return QUAMBA_UNSUPPORTED;
  for (int i = 0; i < s.count; ++i)
    if (!aligned(s.layers[i]) || !complete<KIND, State, TYPE>(s.layers[i], q)) return QUAMBA_UNSUPPORTED;
  p.common = static_cast<unsigned long long*>(s.workspace);
  p.u = reinterpret_cast<float*>(static_cast<char*>(s.workspace) +
                                 rounded_up(8ll * kCopies * std::min(s.count, kMostLayers) * common_of(s)));
  p.residual = p.u + q.H;
  p.counts = reinterpret_cast<unsigned*>(p.residual + s.D);
  return launch_layers(selective_stack<KIND, State, TYPE>, p, s, workspace_of(s), sms, bytes, stream);
}

// By the type of the states and of the activations.
template <Kind HALF, Kind BRAIN>
int launch(const QuambaSelectiveStack* s, bool only_plan, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int type = s->mixer.in, state = s->mixer.state_type;
  if (type == QUAMBA_F16 && state == QUAMBA_I8) return launch<HALF, int8_t, QUAMBA_F16>(*s, only_plan, to);
  if (type == QUAMBA_F16 && state == QUAMBA_F16) return launch<HALF, __half, QUAMBA_F16>(*s, only_plan, to);
  if (type == QUAMBA_BF16 && state == QUAMBA_I8) return launch<BRAIN, int8_t, QUAMBA_BF16>(*s, only_plan, to);
  if (type == QUAMBA_BF16 && state == QUAMBA_F16) return launch<BRAIN, __half, QUAMBA_BF16>(*s, only_plan, to);
  return QUAMBA_UNSUPPORTED;
}

}  // namespace quamba::stack::selective
