// int8 GEMM tiles for what larger ones fit badly: pingpong, where one warp group finishes its tile while the other
// multiplies.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 128, 2, Pingpong, Persistent, 2>(0.80f, 1220.f),
    choice<64, 128, 1, Pingpong, Persistent, 2>(0.47f, 400.f),
    narrow(choice<64, 96, 1, Pingpong, Persistent>(0.47f, 300.f)),
    narrow(choice<64, 192, 1, Pingpong, Persistent>(0.66f, 300.f)),
};

Choices small_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
