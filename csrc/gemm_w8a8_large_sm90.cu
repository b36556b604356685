// int8 GEMM tiles that both warp groups work on: the largest ones, which load the least for each multiplication.
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 256, 2, Cooperative, Persistent>(0.88f, 4500.f),
    choice<128, 256, 1, Cooperative, Persistent>(0.90f, 4500.f),
    choice<128, 192, 2, Cooperative, Persistent>(0.88f, 3800.f),
};

Choices large_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
