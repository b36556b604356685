// An int4 weight of two levels that a kernel writes out as int8 beside its own work, for a linear that comes later.
#pragma once

typedef struct {           // of QuambaConv, QuambaScan, QuambaSsdScan; y null: nothing
  const void* w;           // int32 [O, K/8], as in linear.h
  const void* multiplier;  // int8 [O, K/S]
  void* y;                 // int8 [O, K]
  int O, K, S;             // S a multiple of 16 that divides K
} QuambaExpansion;
