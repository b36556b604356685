// The two kernels that take the place of ssd_rows for many rows of int8 state; see ssd_inputs.cu and ssd_stream.cu.
#pragma once

#include "decode.h"

namespace quamba::decode {

// What ssd_inputs leaves in the workspace, behind u [B, I].
struct SsdTerms {
  float2* rows;       // [B, I]: x, silu(z)
  float4* heads;      // [B, H]: exp(dt A), dt, D, unused
  void *B, *C;        // [B, G N]: codes, or fp32 where they have no scale
  unsigned* dither;   // [N]: draws of the columns
  long long bytes;    // of the workspace in all
};

inline SsdTerms ssd_terms(const QuambaDecode& q) {
  const long long rows = static_cast<long long>(q.batch) * q.H * q.P, heads = static_cast<long long>(q.batch) * q.H;
  const long long columns = static_cast<long long>(q.batch) * q.G * q.N * (q.C_scale ? 1 : 4);
  long long at = 0;
  const auto take = [&](long long bytes) {
    char* const place = static_cast<char*>(q.workspace) + at;
    at += (bytes + 15) / 16 * 16;
    return place;
  };
  take(4 * rows);  // u
  SsdTerms terms{};
  terms.rows = reinterpret_cast<float2*>(take(8 * rows));
  terms.heads = reinterpret_cast<float4*>(take(16 * heads));
  terms.B = take(columns);
  terms.C = take(columns);
  terms.dither = reinterpret_cast<unsigned*>(take(4 * q.N));
  terms.bytes = at;
  return terms;
}

// Whether the two kernels serve the call, and pay: alignment of what they read as words, and enough rows.
bool can_stream(const QuambaDecode& q, int sms);
int launch_stream(const QuambaDecode& q, int sms, void* stream);
cudaError_t launch_inputs(const QuambaDecode& q, const SsdTerms& terms, void* stream);

}  // namespace quamba::decode
