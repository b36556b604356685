// Into how many segments the SSD scan cuts a sequence, and its two launches: operands, then states and outputs. There
// are two ways to do it: that of ssd_scan_sm90.cuh where it serves, and that of ssd_scan.cuh.
#include <algorithm>

#include "expansion.cuh"
#include "ssd_scan_sm90.cuh"

namespace {

using namespace quamba;
using namespace quamba::ssd;
using std::max;
using std::min;

int tokens_of(const QuambaSsdScan& a) { return a.N == 256 || (a.N == 128 && a.P == 128) ? 32 : 64; }  // of a chunk

// Scratch, in the order of Params.
struct Scratch {
  long long slots, operands, exponents, steps, flags, local, left, bytes;

  Scratch(const QuambaSsdScan& a, int cuts) {
    const int tokens = tokens_of(a);
    const long long states = static_cast<long long>(a.sequences) * a.H * (cuts - 1);
    slots = a.cu_seqlens ? a.T / tokens + a.sequences : a.sequences * ((a.T + tokens - 1) / tokens);
    operands = 0;
    exponents = operands + slots * a.G * (hopper::serves(a) ? hopper::kSlotBytes
                                                            : 2 * tokens * kPitch * (a.N > 64 ? a.N / 64 : 1));
    steps = exponents + slots * a.G * 16;
    const int record = hopper::serves(a) ? hopper::kHeadRecord : tokens == 64 ? kRecord<64> : kRecord<32>;
    flags = steps + slots * a.H * 4 * record;
    local = flags + (states * 4 + 15) / 16 * 16;
    left = local + states * a.P * a.N * (hopper::serves(a) ? 8 : 4);
    bytes = left + states * 8;
  }
};

constexpr int kMostCuts = 32;  // a thread waits for each

// As many segments as let the blocks of the outputs run all at once, and none of fewer than two chunks: measured on an
// H100, fewer leave processors idle, and more run in a second wave.
int cuts_of(const QuambaSsdScan& a) {
  if (a.cuts || a.T == 0) return a.T == 0 ? 1 : a.cuts;
  int processors = 0, shared = 0;
  if (device_attribute(cudaDevAttrMultiProcessorCount, processors) != cudaSuccess ||
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared) != cudaSuccess)
    return 1;
  const long long chunks = ((a.cu_seqlens ? a.T / a.sequences : a.T) + tokens_of(a) - 1) / tokens_of(a);
  const long long most = max(min(chunks / 2, 0LL + kMostCuts), 1LL);
  if (hopper::serves(a))
    return static_cast<int>(max(min(processors / hopper::blocks_of(a), most), 1LL));
  const int tokens = tokens_of(a), panels = 3 * (a.N > 64 ? a.N / 64 : 1) + 1 + (a.P > 64 ? a.P / 64 : 1);
  const int bytes = tokens * (kPitch * panels + a.P * size_of(a.x_dtype)) + 3584;  // of a block
  const int resident = min(blocks_by_registers(a.N, a.P), max(shared / bytes, 1));
  const long long at_once = static_cast<long long>(resident) * processors;
  return static_cast<int>(max(min(at_once / (static_cast<long long>(a.H) * a.sequences), most), 1LL));
}

bool in_sixteens(const void* data, int type, long long token, long long batch, long long part) {
  const int elements = 16 / size_of(type);
  return reinterpret_cast<unsigned long long>(data) % 16 == 0 && token % elements == 0 && batch % elements == 0 &&
         part % elements == 0;
}

int launch_states(const Params& p, void* stream) {
  switch (p.a.N) {
    case 16:
    case 32: return launch_32(p, stream);
    case 64: return launch_64(p, stream);
    case 128: return launch_128(p, stream);
    case 256: return launch_256(p, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace

bool quamba::ssd::prepare(const QuambaSsdScan& a, Params& p) {
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  auto lies_at = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  auto is_short = [](int type) { return type == QUAMBA_I8 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  if (a.T < 0 || a.cuts < 0 || a.cuts > kMostCuts || a.sequences < 1 || a.G < 1 || a.H < 1 || a.H % a.G ||
      (a.cu_seqlens && a.T > 0x7fffffffLL) ||
      !is_short(a.x_dtype) || !is_short(a.b_dtype) || !is_short(a.c_dtype) || !is_float(a.dt_dtype) ||
      !is_float(a.D_dtype) || (a.dt_bias && !is_float(a.dt_bias_dtype)) || a.y_dtype == QUAMBA_I8 ||
      !is_short(a.y_dtype) || !in_sixteens(a.x, a.x_dtype, a.x_token, a.x_batch, a.x_head) ||
      !in_sixteens(a.b, a.b_dtype, a.b_token, a.b_batch, a.b_group) ||
      !in_sixteens(a.c, a.c_dtype, a.c_token, a.c_batch, a.c_group) || !lies_at(a.state, 8) || !lies_at(a.last, 8) ||
      !lies_at(a.y, 16) || !lies_at(a.workspace, 16) ||
      (a.expansion.y && !expands(a.expansion)))
    return false;
  p.a = a, p.cuts = cuts_of(a);
  const Scratch scratch(a, p.cuts);
  if (scratch.bytes > a.workspace_bytes) return false;
  char* base = static_cast<char*>(a.workspace);
  p.slots = scratch.slots;
  p.operands = reinterpret_cast<unsigned char*>(base + scratch.operands);
  p.exponents = reinterpret_cast<int*>(base + scratch.exponents);
  p.steps = reinterpret_cast<float*>(base + scratch.steps);
  p.flags = reinterpret_cast<int*>(base + scratch.flags);
  p.local = reinterpret_cast<float*>(base + scratch.local), p.left = reinterpret_cast<float*>(base + scratch.left);
  return true;
}

extern "C" long long quamba_ssd_scan_workspace(const QuambaSsdScan* args) {
  return Scratch(*args, cuts_of(*args)).bytes;
}

extern "C" int quamba_ssd_scan(const QuambaSsdScan* args, void* stream) {
  Params p;
  if (!prepare(*args, p)) return QUAMBA_UNSUPPORTED;
  if constexpr (kHopper) {
    if (hopper::serves(p.a)) {
      const int status = hopper::launch_inputs(p, stream);
      return status == QUAMBA_OK ? hopper::launch_scan(p, stream) : status;
    }
  }
  if (int status = launch_operands(p, tokens_of(p.a), stream); status != QUAMBA_OK) return status;
  return expand_after(launch_states(p, stream), p.a.expansion, stream);
}
