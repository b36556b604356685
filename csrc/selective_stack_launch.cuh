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
  int ordinal = 0, most = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  get(sms, cudaDevAttrMultiProcessorCount);
  get(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return error;
  if (!cooperative || sms > kMostBlocks || !describe<KIND>(p.matrix[0], inner, s.D, s.S, sms) ||
      !describe<KIND>(p.matrix[1], s.D, inner, s.S, sms))
    return QUAMBA_UNSUPPORTED;
  p.groups = KIND == Kind::kW8A8 ? 0 : inner / s.S;

  const int channels = most_rows(p.matrix[0], sms);
  if (channels > kMostChannels || most_rows(p.matrix[1], sms) > kTeam) return QUAMBA_UNSUPPORTED;
  p.pitch = (channels / kOctet | 1) * kOctetBytes<KIND>;  // odd, for the banks
  p.dt_at = 0, p.x_at = (channels * s.R + 15) / 16 * 16;
  p.multipliers_at = (p.x_at + common_of(s) * p.pitch + 15) / 16 * 16;
  const int more = p.multipliers_at + (KIND == Kind::kW8A8 ? 0 : 2 * common_of(s) * (kCodes ? 1 : 2));

  int stage_bytes = 0;
  for (const Matrix& m : p.matrix) {
    stage_bytes = std::max(stage_bytes, (m.row_bytes + m.scale_bytes) << m.stage_rows_log);
    p.x_bytes = std::max(p.x_bytes, m.steps * kStepX<KIND>);
  }
  p.stage_bytes = (stage_bytes + 63) / 128 * 128 + 64;
  p.row_floats = (Team::place(inner) + 31) / 32 * 32;
  const auto stride = [](const Matrix& m) { return kWarps >> m.parts_log << m.strip_stages_log; };
  int others = 0;
  for (bool again = true; again;) {
    p.sums_bytes = 0;
    for (const Matrix& m : p.matrix)
      p.sums_bytes = std::max(p.sums_bytes, 4 * kStrip * strips_of(m, sms) << m.parts_log);
    others = kBarrierBytes + p.x_bytes + p.sums_bytes + static_cast<int>(sizeof(Between) + offsetof(Made, more)) +
             more + 4 * (kScratch + kQuads * kWarps + p.row_floats);
    p.stages = std::min((most - others) / p.stage_bytes, kMaxStages) / 2 * 2;
    again = false;
    for (Matrix& m : p.matrix) {
      if (stride(m) <= p.stages) continue;
      if (m.parts() == kWarps) return QUAMBA_UNSUPPORTED;
      ++m.parts_log, again = true;
    }
  }
  // where a turn does not fit the ring, the stage before in a slot has to be the warp's own (see Stage)
  for (bool again = true; again;) {
    again = false;
    for (const Matrix& m : p.matrix)
      if (most_rows(m, sms) >> m.stage_rows_log > p.stages && p.stages % stride(m))
        p.stages -= p.stages % stride(m), again = true;
  }
  bytes = others + p.stages * p.stage_bytes;
  p.ahead = kAhead, p.pace = kPace;
  return QUAMBA_OK;
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
  p.x = s.x, p.y = s.y;
  p.common = static_cast<unsigned long long*>(s.workspace);
  p.u = reinterpret_cast<float*>(static_cast<char*>(s.workspace) +
                                 rounded_up(8ll * kCopies * std::min(s.count, kMostLayers) * common_of(s)));
  p.residual = p.u + q.H;
  p.counts = reinterpret_cast<unsigned*>(p.residual + s.D);

  const auto kernel = selective_stack<KIND, State, TYPE>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(sms);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  for (int layer = 0; error == cudaSuccess && layer < s.count; layer += kMostLayers) {
    p.layers = std::min(kMostLayers, s.count - layer);
    std::copy(s.layers + layer, s.layers + layer + p.layers, p.layer);
    if (layer) p.x = p.y;
    error = cudaMemsetAsync(s.workspace, 0, workspace_of(s), stream);  // sums of nothing, and there is no layer 0
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, p);
  }
  return error != cudaSuccess ? error : cudaGetLastError();
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
