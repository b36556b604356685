// int8 GEMM tiles for what a large cooperative tile fits badly: pingpong, where one warp group finishes its tile while
// the other multiplies, and stream-K, where all multiprocessors share a few tiles along K.
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 128, 2, Pingpong, Persistent>(0.85f, 1220.f),
    choice<64, 128, 1, Pingpong, Persistent>(0.47f, 400.f),
    choice<128, 64, 1, Cooperative, StreamK>(0.64f, 4900.f),
};

Choices small_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
