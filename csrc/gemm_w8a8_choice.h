// What the choice of a tile needs to know of each; the tiles are compiled in several files, for they take long.
#pragma once

#include <cuda_runtime.h>

#include "linear.h"

namespace quamba::w8a8 {

struct Choice {
  int tile_m, tile_n, cluster;
  char kind;    // 'c': two warp groups on one tile; 'p': each on its own, in turns; 's': stream-K, like 'c';
                // 'n': like 'p', for narrow problems of one tile a multiprocessor
  float rate;   // the share of the tensor cores' peak that the main loop reaches
  float extra;  // cycles a tile of 16-bit results costs besides; a pingpong hides most of its epilogue
  int (*launch)(const QuambaLinear&, int sms, cudaStream_t);
  long long (*workspace)(const QuambaLinear&, int sms);
};

struct Choices {
  const Choice *first, *last;
  const Choice* begin() const { return first; }
  const Choice* end() const { return last; }
};

Choices large_tiles();
Choices wide_tiles();
Choices small_tiles();
Choices split_tiles();

}  // namespace quamba::w8a8
