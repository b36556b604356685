// One token of the causal convolution by itself, its input quantised on the way: a thread a channel. What Mamba1 needs
// before x_proj, and a token's worth of launch latency in all: constants are read ahead of the wait. Of many sequences a
// thread takes four channels.
#include "conv_quad.cuh"
#include "decode_launch.cuh"

namespace quamba::decode {

constexpr int kConvThreads = 128;
constexpr int kQuadBatch = 8;  // sequences from which on four channels a thread are faster

__global__ void __launch_bounds__(kConvThreads) conv_decode(const __grid_constant__ QuambaDecode q) {
  launch_dependents();
  const int channel = blockIdx.x * kConvThreads + threadIdx.x, batch = blockIdx.y;
  const bool exists = channel < q.channels;
  const Taps taps = taps_of<false>(q, exists ? channel : 0);
  wait_for_previous_kernel();
  if (!exists) return;
  const Window window = window_of<false>(q, batch, channel, q.x, batch * q.x_stride + channel);
  store(q.out, q.out_type, static_cast<long long>(batch) * q.channels + channel, convolve<false>(q, taps, window));
  shift<false>(q, taps.in, window);
}

__global__ void __launch_bounds__(kConvThreads) conv_decode_quads(const __grid_constant__ QuambaDecode q) {
  launch_dependents();
  const int channel = 4 * (blockIdx.x * kConvThreads + threadIdx.x), batch = blockIdx.y;
  if (channel >= q.channels) return;
  const QuadTaps taps = quad_taps(q, channel);
  wait_for_previous_kernel();
  const uint2 x = fetch_halves(q.x, batch * q.x_stride + channel);
  const QuadWindow window = quad_window(q, batch, channel);
  float y[4];
  convolve_quad(q, taps, window, x, y);
  reinterpret_cast<unsigned*>(q.out)[(static_cast<long long>(batch) * q.channels + channel) / 4] = quad_codes(y);
}

}  // namespace quamba::decode

extern "C" int quamba_conv_decode(const QuambaDecode* call, void* stream) {
  using namespace quamba::decode;
  const QuambaDecode& q = *call;
  if (q.batch < 1 || q.batch > 65535 || q.channels < 1 || reinterpret_cast<uintptr_t>(q.conv_weight) % 16)
    return QUAMBA_UNSUPPORTED;
  if (q.batch >= kQuadBatch && has_quads(q) && reinterpret_cast<uintptr_t>(q.out) % 4 == 0)
    return launch(conv_decode_quads, q, dim3((q.channels / 4 + kConvThreads - 1) / kConvThreads, q.batch), kConvThreads, 0,
                  stream);
  return launch(conv_decode, q, dim3((q.channels + kConvThreads - 1) / kConvThreads, q.batch), kConvThreads, 0, stream);
}
