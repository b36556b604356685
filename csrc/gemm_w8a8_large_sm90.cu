// The int8 GEMM tile that both warp groups work on: the largest, which loads the least for each multiplication.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {choice<128, 256, 2, Cooperative, Persistent>(0.97f, 6000.f)};

Choices large_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
