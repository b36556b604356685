// int8 GEMM tiles for what a large cooperative tile fits badly: pingpong, where one warp group finishes its tile while
// the other multiplies, and stream-K, where all multiprocessors share a few tiles along K.
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 128, 2, Pingpong, Persistent>(0.88f, 600.f),
    choice<64, 128, 1, Pingpong, Persistent>(0.55f, 500.f),
    choice<128, 64, 1, Cooperative, StreamK>(0.45f, 2500.f),
};

Choices small_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
