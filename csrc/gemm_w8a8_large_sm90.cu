// int8 GEMM tiles that both warp groups work on: the largest ones, which load the least for each multiplication.
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 256, 2, Cooperative, Persistent>(0.80f, 10000.f),
    choice<128, 256, 1, Cooperative, Persistent>(1.06f, 8800.f),
    choice<128, 192, 2, Cooperative, Persistent>(0.93f, 6400.f),
};

Choices large_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
