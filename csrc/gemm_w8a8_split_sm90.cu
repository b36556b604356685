// The int8 GEMM tile for stream-K, where all multiprocessors share a few tiles along K.
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {choice<128, 64, 1, Cooperative, StreamK>(0.64f, 4900.f)};

Choices split_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
