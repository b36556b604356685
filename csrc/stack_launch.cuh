// The host side of stacks: checks the arguments, divides shared memory, launches.
#pragma once

#include <algorithm>
#include <cstddef>

#include "ssd_stack.cuh"

namespace quamba::stack {

inline int64_t rounded_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline int outputs(const QuambaDecode& q) { return 2 * q.H * q.P + 2 * q.G * q.N + q.H; }

inline int64_t workspace_of(const QuambaStack& s) {
  return rounded_up(4ll * outputs(s.mixer)) + 4ll * (s.mixer.H * s.mixer.P + s.D) + 2 * sizeof(unsigned);
}

// The largest share of a matrix.
inline int most_rows(const Matrix& m, int blocks) { return (m.O / kOctet + blocks - 1) / blocks * kOctet; }

inline int strips_of(const Matrix& m, int blocks) { return (most_rows(m, blocks) + kStrip - 1) / kStrip; }

// A matrix of O rows of K, for so many blocks; false where it cannot be copied in stages.
template <Kind KIND>
bool describe(Matrix& m, int O, int K, int S, int blocks) {
  m = {};
  m.O = O, m.K = K, m.row_bytes = KIND == Kind::kW8A8 ? K : K / 2, m.steps = m.row_bytes / kStep;
  if (O % kOctet || m.row_bytes % (2 * kStep) || K > kQuads * 4 * kTeam) return false;
  if (KIND != Kind::kW8A8) {
    if (S != 2 * kStep) return false;
    m.scale_bytes = K / S * (kInteger<KIND> ? 1 : 2);
  }
  for (m.stage_rows_log = 3; m.stage_rows_log > 1 && m.row_bytes << m.stage_rows_log > kStageBytes;) --m.stage_rows_log;
  m.strip_stages_log = 4 - m.stage_rows_log;
  // parts by what they take: rounds of the warps, times steps and what a part costs beside them
  const int strips = strips_of(m, blocks);
  double least = 0;
  for (int log = 0; 1 << log <= kWarps; ++log) {
    const int parts = 1 << log;
    const double cost = (strips * parts + kWarps - 1) / kWarps * ((m.steps + parts - 1) / parts + 1.5);
    if (!log || cost < least) m.parts_log = log, least = cost;
  }
  return m.row_bytes << m.stage_rows_log <= kStageBytes && (m.scale_bytes << m.stage_rows_log) % 16 == 0;
}

// Whether what is copied in bulk begins at a multiple of 16 bytes.
inline bool aligned(const QuambaStackLayer& l) {
  for (const void* p : {l.in.w, l.in.w_scale, l.in.w_multiplier, l.out.w, l.out.w_scale, l.out.w_multiplier,
                        static_cast<const void*>(l.conv_state), l.conv_weight, l.conv_bias,
                        static_cast<const void*>(l.conv_weight_scale), static_cast<const void*>(l.conv_in_scale),
                        static_cast<const void*>(l.conv_out_scale),
                        static_cast<const void*>(l.state), static_cast<const void*>(l.state_scale),
                        static_cast<const void*>(l.x_scale), static_cast<const void*>(l.z_scale), l.norm_weight,
                        l.gate_weight})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

// Multiprocessors, and the shared memory that a block may have; QUAMBA_UNSUPPORTED where blocks cannot be launched together.
inline int look_at_device(int& sms, int& most) {
  int ordinal = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  get(sms, cudaDevAttrMultiProcessorCount);
  get(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return error;
  return cooperative ? QUAMBA_OK : QUAMBA_UNSUPPORTED;
}

// Shared memory among the ring and all else, of which a kind of stack brings `rest`; bytes: of it all. P: of a kind of stack.
template <Kind KIND, typename P>
int divide(P& p, int sms, int most, int rest, int& bytes) {
  int stage_bytes = 0;
  for (const Matrix& m : p.matrix) {
    stage_bytes = std::max(stage_bytes, (m.row_bytes + m.scale_bytes) << m.stage_rows_log);
    p.x_bytes = std::max(p.x_bytes, m.steps * kStepX<KIND>);
    if (most_rows(m, sms) > kTeam) return QUAMBA_UNSUPPORTED;
  }
  p.stage_bytes = (stage_bytes + 63) / 128 * 128 + 64;
  p.row_floats = (Team::place(p.matrix[1].K) + 31) / 32 * 32;
  // from a warp's strip to its next
  const auto stride = [](const Matrix& m) { return kWarps >> m.parts_log << m.strip_stages_log; };
  int others = 0;
  for (bool again = true; again;) {
    p.sums_bytes = 0;
    for (const Matrix& m : p.matrix)
      p.sums_bytes = std::max(p.sums_bytes, 4 * kStrip * strips_of(m, sms) << m.parts_log);
    others = kBarrierBytes + p.x_bytes + p.sums_bytes + rest + 4 * (kScratch + kQuads * kWarps + p.row_floats);
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
  return QUAMBA_OK;
}

// All layers, as many at a time as a launch takes. Its workspace is cleared before each: there is no layer 0.
template <typename P, typename S>
int launch_layers(void (*kernel)(P), P& p, const S& s, int64_t workspace, int sms, int bytes, cudaStream_t stream) {
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
  p.x = s.x, p.y = s.y;
  for (int layer = 0; error == cudaSuccess && layer < s.count; layer += kMostLayers) {
    p.layers = std::min(kMostLayers, s.count - layer);
    std::copy(s.layers + layer, s.layers + layer + p.layers, p.layer);
    if (layer) p.x = p.y;
    error = cudaMemsetAsync(s.workspace, 0, workspace, stream);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, p);
  }
  return error != cudaSuccess ? error : cudaGetLastError();
}

// Everything but the pointers; QUAMBA_UNSUPPORTED for what the kernel does not take.
template <Kind KIND, typename State, int TYPE>
int plan(const QuambaStack& s, Params& p, int& sms, int& bytes) {
  const QuambaDecode& q = s.mixer;
  const int inner = q.H * q.P;
  constexpr bool kCodes = kInteger<KIND>;
  p.mixer = q, p.eps = s.eps;
  if (q.batch != 1 || q.G < 1 || q.H % q.G || q.N != kN || inner % kRun || inner / q.G % 8 || s.D % kRun || s.count < 1)
    return QUAMBA_UNSUPPORTED;
  if (q.conv_state_type != (kCodes ? QUAMBA_I8 : TYPE) || q.conv_weight_type != q.conv_state_type)
    return QUAMBA_UNSUPPORTED;
  const int groups = q.norm_groups, runs = groups > 0 ? inner / groups / kRun : 0;
  if (groups < 0 || (groups && (inner % (groups * kRun) || (groups > 1 && runs & (runs - 1))))) return QUAMBA_UNSUPPORTED;
  p.groups[0] = {1, s.D / kRun, 1.f / static_cast<float>(s.D)};
  p.groups[1] = {groups, runs, groups ? 1.f / static_cast<float>(runs * kRun) : 0.f};
  if (!make_rotation(q.block, p.rotation) || p.rotation.base > 20 ||
      (p.rotation.base && (p.rotation.bits < 5 || inner % q.block)))
    return QUAMBA_UNSUPPORTED;
  if (q.channels % 16 || q.P * (Mixer<kCodes, State>::kHeads - 1) < kMostRows) return QUAMBA_UNSUPPORTED;
  int most = 0;
  const int status = look_at_device(sms, most);
  if (status != QUAMBA_OK) return status;
  if (!describe<KIND>(p.matrix[0], outputs(q), s.D, s.S, sms) ||
      !describe<KIND>(p.matrix[1], s.D, inner, s.S, sms))
    return QUAMBA_UNSUPPORTED;

  const int group_rows = inner / q.G;
  p.blocks = sms / q.G;
  if (!p.blocks) return QUAMBA_UNSUPPORTED;
  p.rows = ((group_rows + p.blocks - 1) / p.blocks + 7) / 8 * 8;
  if (p.rows > kMostRows) return QUAMBA_UNSUPPORTED;
  p.ahead = std::min(s.D, outputs(q)) / kOctet >= sms ? kAhead : 0;

  using Made = Mixer<kCodes, State>;
  const int rest =
      static_cast<int>(sizeof(Between) + offsetof(Made, state)) + p.rows * kN * static_cast<int>(sizeof(State));
  const int divided = divide<KIND>(p, sms, most, rest, bytes);
  if (divided != QUAMBA_OK) return divided;
  // of a layer's time, for bringing its weights: what has been found best, by what of a layer the ring holds
  int copies = 0;
  for (const Matrix& m : p.matrix) copies += most_rows(m, sms) >> m.stage_rows_log;
  p.ask_pace = tuned("QUAMBA_ASK_PACE", kAskPace);
  p.pace = tuned("QUAMBA_PACE", 50 + 35 * std::min(p.stages, copies) / copies);
  return QUAMBA_OK;
}

// Whether tensors are there where the kernel reads them, and not where it does not.
template <Kind KIND, int TYPE>
bool complete(const QuambaStackLayer& l, const QuambaDecode& q) {
  constexpr bool kCodes = kInteger<KIND>;
  for (const float* scale : {l.conv_in_scale, static_cast<const float*>(l.conv_weight_scale), l.conv_out_scale, l.x_scale,
                             l.B_scale, l.C_scale})
    if ((scale != nullptr) != kCodes) return false;
  return (kCodes || !l.z_scale) && (!l.conv_bias || q.conv_bias_type == TYPE);
}

template <Kind KIND, typename State, int TYPE>
int launch(const QuambaStack& s, bool only_plan, cudaStream_t stream) {
  const QuambaDecode& q = s.mixer;
  Params p{};
  int sms = 0, bytes = 0;
  const int status = plan<KIND, State, TYPE>(s, p, sms, bytes);
  if (status != QUAMBA_OK || only_plan) return status;
  if (s.workspace_bytes < workspace_of(s)) return QUAMBA_UNSUPPORTED;
  for (int i = 0; i < s.count; ++i)
    if (!aligned(s.layers[i]) || !complete<KIND, TYPE>(s.layers[i], q)) return QUAMBA_UNSUPPORTED;
  p.projected = static_cast<unsigned*>(s.workspace);
  p.u = reinterpret_cast<float*>(static_cast<char*>(s.workspace) + rounded_up(4ll * outputs(q)));
  p.residual = p.u + q.H * q.P;
  p.counts = reinterpret_cast<unsigned*>(p.residual + s.D);
  return launch_layers(ssd_stack<KIND, State, TYPE>, p, s, workspace_of(s), sms, bytes, stream);
}

// By the type of the states.
template <Kind KIND, int TYPE>
int launch(const QuambaStack& s, bool only_plan, cudaStream_t stream) {
  if (s.mixer.state_type == QUAMBA_I8) return launch<KIND, int8_t, TYPE>(s, only_plan, stream);
  if (s.mixer.state_type == QUAMBA_F16) return launch<KIND, __half, TYPE>(s, only_plan, stream);
  return QUAMBA_UNSUPPORTED;
}

// And of the activations.
template <Kind HALF, Kind BRAIN>
int launch(const QuambaStack* s, bool only_plan, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (s->mixer.in == QUAMBA_F16) return launch<HALF, QUAMBA_F16>(*s, only_plan, to);
  if (s->mixer.in == QUAMBA_BF16) return launch<BRAIN, QUAMBA_BF16>(*s, only_plan, to);
  return QUAMBA_UNSUPPORTED;
}

}  // namespace quamba::stack
