// int8 GEMM tiles in pingpong, as wide as the registers of one warp group hold: nothing waits for their epilogues.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1
#include "gemm_w8a8_tile.cuh"

namespace quamba::w8a8 {

const Choice kTiles[] = {
    choice<128, 192, 2, Pingpong, Persistent>(0.87f, 900.f),
    choice<128, 160, 2, Pingpong, Persistent, 2>(0.87f, 800.f),
};

Choices wide_tiles() { return choices(kTiles); }

}  // namespace quamba::w8a8
